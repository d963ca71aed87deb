"""Published data sets as column maps.

A map is all that `llmrec.data.sources.published` needs to read a set. What the sets' pages say about them, such as
terms, stands here too; their published counts are in `llmrec.data.sources.counts`.
"""

from __future__ import annotations

from llmrec.data.sources.spec import Attribute, Events, Form, Items, Known, Layout, People, Renames

_JSON = Form(kind="json")
_DICTS = Form(kind="dicts")
_CSV = Form(kind="delimited", quoted=True)
_TABS = Form(kind="delimited", separator="\t")


# --------------------------------------------------------------------------- MovieLens

_COLONS = "::"
_OLD_ENCODINGS = ("utf-8", "latin-1")
_AGES = {
    "1": "under 18",
    "18": "18-24",
    "25": "25-34",
    "35": "35-44",
    "45": "45-49",
    "50": "50-55",
    "56": "56 or older",
}
_JOBS = dict(
    enumerate(
        (
            *("other or not specified", "academic or educator", "artist", "clerical or admin"),
            *("college or graduate student", "customer service", "doctor or health care"),
            *("executive or managerial", "farmer", "homemaker", "K-12 student", "lawyer", "programmer", "retired"),
            *("sales or marketing", "scientist", "self-employed", "technician or engineer"),
            *("tradesman or craftsman", "unemployed", "writer"),
        )
    )
)
_GENRES = Attribute(
    name="genres", column="genres", split="|", words={"(no genres listed)": "unknown"}, missing="unknown"
)


def _dat(*columns: str) -> Form:
    return Form(kind="delimited", separator=_COLONS, columns=columns, encodings=_OLD_ENCODINGS)


def _films(file: str, form: Form, item: str) -> Items:
    return Items(
        files=(file,), form=form, item=item, titles=("title",), attributes=(_GENRES,), film=True, complete=True
    )


_DAT = Layout(
    events=Events(
        files=("ratings.dat",),
        form=_dat("user", "movie", "rating", "timestamp"),
        user="user",
        item=("movie",),
        rating="rating",
        time="timestamp",
    ),
    items=_films("movies.dat", _dat("movie", "title", "genres"), "movie"),
    people=People(
        files=("users.dat",),
        form=_dat("user", "gender", "age", "occupation", "zip"),
        user="user",
        attributes=(
            Attribute(name="age", column="age", words=_AGES),
            Attribute(name="gender", column="gender", words={"M": "male", "F": "female"}),
            Attribute(name="occupation", column="occupation", words={str(code): job for code, job in _JOBS.items()}),
        ),
    ),
)
_RATINGS_CSV = Layout(
    events=Events(
        files=("ratings.csv",), form=_CSV, user="userId", item=("movieId",), rating="rating", time="timestamp"
    ),
    items=_films("movies.csv", _CSV, "movieId"),
)


def _movielens(size: str, layout: Layout, lowest: float, *, folder: str | None = None) -> Known:
    folder = folder or f"ml-{size}"
    return Known(
        name=f"movielens-{size}",
        noun="movies",
        layouts=(layout,),
        folders=tuple(dict.fromkeys((folder, f"ml-{size}"))),
        scale=(lowest, 5.0),
        page="https://grouplens.org/datasets/movielens/",
        fetch=f"ml-{size}.zip",
        licence="GroupLens research licence: research use, no commercial use without permission, redistribution only "
        "as the set's README says; cite Harper and Konstan 2015",
    )


MOVIELENS_1M = _movielens("1m", _DAT, 1.0)
MOVIELENS_10M = _movielens("10m", _DAT, 0.5, folder="ml-10M100K")
MOVIELENS_20M = _movielens("20m", _RATINGS_CSV, 0.5)
MOVIELENS_25M = _movielens("25m", _RATINGS_CSV, 0.5)
MOVIELENS_32M = _movielens("32m", _RATINGS_CSV, 0.5)
MOVIELENS_LATEST = _movielens("latest", _RATINGS_CSV, 0.5)


# --------------------------------------------------------------------------- Amazon

_PRICE = r"\$?\d[\d,.]*(?: - \$?\d[\d,.]*)?"
_BRAND = Attribute(name="brand", column="brand")
_PRICED = Attribute(name="price", column="price", keep=_PRICE)
_ASIN = ("asin",)


def _reviews(*files: str, user: str = "reviewerID", item: tuple[str, ...] = _ASIN, new: bool = False) -> Events:
    return Events(
        files=files,
        skip=("meta_*", "metadata*"),
        form=_JSON if new else _DICTS,
        user=user,
        item=item,
        rating="rating" if new else "overall",
        time="timestamp" if new else "unixReviewTime",
        texts=("text", "title") if new else ("reviewText", "summary"),
    )


def _ratings(file: str, *columns: str, item: str = "item", user: str = "user", time: str = "timestamp") -> Events:
    form = Form(kind="delimited", columns=columns)
    return Events(files=(file,), form=form, user=user, item=(item,), rating="rating", time=time)


_META_2014 = Items(
    files=("meta_{}.json", "metadata.json"),
    form=_DICTS,
    item="asin",
    titles=("title",),
    attributes=(Attribute(name="categories", column="categories", join=" > "), _BRAND, _PRICED),
)
_META_2018 = Items(
    files=("meta_{}.json",),
    form=_DICTS,
    item="asin",
    titles=("title",),
    junk="getTime",
    attributes=(Attribute(name="categories", column="category", join=" > "), _BRAND, _PRICED),
)
_META_2023 = Items(
    files=("meta_{}.json",),
    form=_JSON,
    item="parent_asin",
    titles=("title",),
    attributes=(
        Attribute(name="categories", column="categories", join=" > "),
        Attribute(name="main_category", column="main_category"),
        Attribute(name="brand", column="store"),
        _PRICED,
    ),
)
_NO_LICENCE = "the page names no licence; published for research, reviews and metadata are Amazon's and their authors'"

AMAZON_2014 = Known(
    name="amazon-2014",
    noun="products",
    layouts=(
        Layout(events=_reviews("reviews_*_5.json", "reviews_*.json", "reviews.json"), items=_META_2014),
        Layout(events=_ratings("ratings_*.csv", "user", "item", "rating", "timestamp"), items=_META_2014),
    ),
    scale=(1.0, 5.0),
    page="https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html",
    fetch="reviews_CATEGORY_5.json.gz (or ratings_CATEGORY.csv) and meta_CATEGORY.json.gz",
    licence=f"{_NO_LICENCE}; cite He and McAuley 2016, McAuley et al. 2015",
)
AMAZON_2018 = Known(
    name="amazon-2018",
    noun="products",
    layouts=(
        Layout(events=_reviews("*_5.json", "*.json"), items=_META_2018),
        Layout(events=_ratings("*.csv", "item", "user", "rating", "timestamp"), items=_META_2018),
    ),
    scale=(1.0, 5.0),
    page="https://nijianmo.github.io/amazon/",
    fetch="CATEGORY_5.json.gz (or CATEGORY.json.gz, or CATEGORY.csv) and meta_CATEGORY.json.gz",
    licence=f"{_NO_LICENCE}; cite Ni, Li and McAuley 2019",
)
AMAZON_2023 = Known(
    name="amazon-2023",
    noun="products",
    layouts=(
        Layout(events=_reviews("*.json", user="user_id", item=("parent_asin",), new=True), items=_META_2023),
        Layout(events=_ratings("*.csv", item="parent_asin", user="user_id"), items=_META_2023),
    ),
    scale=(1.0, 5.0),
    page="https://amazon-reviews-2023.github.io/",
    fetch="CATEGORY.jsonl.gz (or CATEGORY.csv of the 0-core or 5-core ids) and meta_CATEGORY.jsonl.gz",
    licence=f"{_NO_LICENCE}; cite Hou et al. 2024 (arXiv 2403.03952)",
)


# --------------------------------------------------------------------------- further sets

STEAM = Known(
    name="steam",
    noun="games",
    layouts=(
        Layout(
            events=Events(
                files=("steam_reviews.json",),
                form=_DICTS,
                user="username",
                item=("product_id",),
                time="date",
                clock=("%Y-%m-%d",),
                texts=("text",),
            ),
            items=Items(
                files=("steam_games.json",),
                gaps=True,
                form=_DICTS,
                item="id",
                titles=("app_name", "title"),
                attributes=(
                    Attribute(name="genres", column="genres"),
                    Attribute(name="developer", column="developer"),
                    Attribute(name="release_date", column="release_date"),
                ),
            ),
        ),
    ),
    page="https://cseweb.ucsd.edu/~jmcauley/datasets.html#steam_data",
    fetch="steam_reviews.json.gz and steam_games.json.gz",
    licence="the page names no licence; cite Kang and McAuley 2018, Wan and McAuley 2018, Pathak et al. 2017",
    notes=("users are told apart by their name", "times are whole days"),
)

YELP = Known(
    name="yelp",
    noun="businesses",
    layouts=(
        Layout(
            events=Events(
                files=("yelp_academic_dataset_review.json", "review.json"),
                form=_JSON,
                user="user_id",
                item=("business_id",),
                rating="stars",
                time="date",
                clock=("%Y-%m-%d %H:%M:%S", "%Y-%m-%d"),
                texts=("text",),
            ),
            items=Items(
                files=("yelp_academic_dataset_business.json", "business.json"),
                form=_JSON,
                item="business_id",
                titles=("name",),
                attributes=(
                    Attribute(name="categories", column="categories"),
                    Attribute(name="city", column="city"),
                ),
            ),
        ),
    ),
    folders=("yelp_dataset",),
    scale=(1.0, 5.0),
    page="https://business.yelp.com/data/resources/open-dataset/",
    fetch="the JSON archive (after agreeing to its terms), unpacked",
    licence="Yelp dataset user agreement: personal, educational and academic use, no redistribution",
)

_GOODREADS_CLOCK = ("%a %b %d %H:%M:%S %z %Y",)
_BOOKS = Items(
    files=("goodreads_books_{}.json", "goodreads_books.json"),
    form=_JSON,
    item="book_id",
    titles=("title", "title_without_series"),
    attributes=(
        Attribute(name="year", column="publication_year"),
        Attribute(name="publisher", column="publisher"),
        Attribute(name="format", column="format"),
    ),
)
GOODREADS = Known(
    name="goodreads",
    noun="books",
    layouts=(
        Layout(
            events=Events(
                files=("goodreads_reviews_*.json",),
                skip=("*spoiler*",),
                form=_JSON,
                user="user_id",
                item=("book_id",),
                rating="rating",
                unrated=0.0,
                time="date_added",
                clock=_GOODREADS_CLOCK,
                texts=("review_text",),
            ),
            items=_BOOKS,
        ),
        Layout(
            events=Events(
                files=("goodreads_interactions_*.json",),
                form=_JSON,
                user="user_id",
                item=("book_id",),
                rating="rating",
                unrated=0.0,
                time="date_added",
                clock=_GOODREADS_CLOCK,
            ),
            items=_BOOKS,
        ),
        Layout(
            events=Events(
                files=("goodreads_interactions.csv",),
                form=_CSV,
                user="user_id",
                item=("book_id",),
                rating="rating",
                unrated=0.0,
            ),
            items=_BOOKS,
            renames=Renames(files=("book_id_map.csv",), form=_CSV, old="book_id_csv", new="book_id"),
        ),
    ),
    scale=(1.0, 5.0),
    page="https://cseweb.ucsd.edu/~jmcauley/datasets/goodreads.html",
    fetch="goodreads_reviews_GENRE.json.gz, goodreads_interactions_GENRE.json.gz or goodreads_interactions.csv with "
    "book_id_map.csv, and goodreads_books_GENRE.json.gz or goodreads_books.json.gz",
    licence="academic use only, no redistribution, no commercial use; cite Wan and McAuley 2018, Wan et al. 2019",
    notes=("shelved books count as interactions, read or not; rating 0 means none",),
)

LASTFM_2K = Known(
    name="lastfm-2k",
    noun="artists",
    layouts=(
        Layout(
            events=Events(files=("user_artists.dat",), form=_TABS, user="userID", item=("artistID",)),
            items=Items(files=("artists.dat",), form=_TABS, item="id", titles=("name",)),
        ),
    ),
    folders=("hetrec2011-lastfm-2k",),
    page="https://grouplens.org/datasets/hetrec-2011/",
    fetch="hetrec2011-lastfm-2k.zip",
    licence="non-commercial use; cite Cantador, Brusilovsky and Kuflik 2011 and Last.fm",
    notes=("listening counts are left out",),
)

LASTFM_1K = Known(
    name="lastfm-1k",
    noun="artists",
    layouts=(
        Layout(
            events=Events(
                files=("userid-timestamp-artid-artname-traid-traname.tsv",),
                form=Form(
                    kind="delimited",
                    separator="\t",
                    columns=("userid", "timestamp", "artid", "artname", "traid", "traname"),
                ),
                user="userid",
                item=("artid", "artname"),
                time="timestamp",
                clock=("%Y-%m-%dT%H:%M:%SZ",),
                title="artname",
            ),
            people=People(
                files=("userid-profile.tsv",),
                form=_TABS,
                user="#id",
                attributes=(
                    Attribute(name="age", column="age"),
                    Attribute(name="gender", column="gender", words={"m": "male", "f": "female"}),
                    Attribute(name="country", column="country"),
                ),
            ),
        ),
    ),
    folders=("lastfm-dataset-1K",),
    page="http://ocelma.net/MusicRecommendationDataset/lastfm-1K.html",
    fetch="lastfm-dataset-1K.tar.gz, unpacked",
    licence="non-commercial use; cite Celma 2010 and Last.fm",
    notes=("an item is an artist, not a track",),
)

_LOGS = Form(kind="delimited", separator="\t", columns=("impression", "user", "time", "history", "impressions"))
_NEWS = Form(
    kind="delimited",
    separator="\t",
    columns=("id", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities"),
)
MIND = Known(
    name="mind",
    noun="news",
    layouts=(
        Layout(
            events=Events(
                files=("behaviors.tsv",),
                form=_LOGS,
                user="user",
                item=("impressions",),
                time="time",
                clock=("%m/%d/%Y %I:%M:%S %p",),
            ),
            items=Items(
                files=("news.tsv",),
                form=_NEWS,
                item="id",
                titles=("title",),
                attributes=(
                    Attribute(name="category", column="category"),
                    Attribute(name="subcategory", column="subcategory"),
                ),
            ),
        ),
    ),
    folders=("MINDsmall_train", "MINDlarge_train"),
    page="https://msnews.github.io/",
    fetch="MINDsmall_train.zip or MINDlarge_train.zip (after agreeing to its terms)",
    licence="Microsoft Research license terms: non-commercial research, no redistribution; cite Wu et al. 2020",
    notes=("items that were shown and not clicked are left out", "the click history has no times, so there are none"),
)
