// Types of llmrec's HTTP interface, for TypeScript. Written by `make openapi`; do not edit.
// Every answer that is not a success has the body `Failed`. Send an API key as `Authorization: Bearer ...`.

/** End the turn with a question about a field. */
export interface Ask {
  tool: "ask";
  field: string;
}

/** What the family answers; the others are null. */
export interface AskAnswer {
  model: ModelCard;
  notes: string[];
  prompt: string | null;
  usage: Usage;
  /** From the request's arrival to its answer. */
  milliseconds: number;
  item_id: string;
  family: string;
  rating: number | null;
  probability: number | null;
  text: string | null;
}

/** A question of any family that a model was tuned on. */
export interface AskBody {
  model?: string | null;
  /** Of the question: it decides the order of equal scores, and of labels. */
  id?: string;
  user_id?: string | number | null;
  history?: (string | number | PastEvent)[] | null;
  profile?: string;
  /** Return what the model read, too. */
  show_prompt?: boolean;
  item_id?: string | number | null;
  /** In place of item_id: an item with its own title. */
  item?: ItemText | null;
  /** What else is told: review, feature, headline, rating. */
  context?: Record<string, string>;
  /** rating, ctr, explanation, review or stars; a model's card says which. */
  family: string;
}

/** An item of the catalogue. */
export interface CatalogueItem {
  item_id: string;
  title: string;
  fields: Record<string, string>;
}

/** The answer, and the state to send with the next line; its profile may be edited before. */
export interface ChatAnswer {
  text: string;
  items: CatalogueItem[];
  calls: (Search | Filter | Similar | Rank | Explain | Show | Ask | ShowProfile | Forget | Say)[];
  /** The profile in words, in the order of the state's. */
  profile: string[];
  state: State;
  milliseconds: number;
}

/** One line of the user; ``state`` is that of the last answer, and is left out at the beginning. */
export interface ChatBody {
  text: string;
  state?: State;
  /** What ranks; the default without one. */
  model?: string | null;
  k?: number;
}

/** What was erased of a user, and what cannot be erased here. */
export interface Erased {
  user_id: string;
  events: number;
  features: number;
  /** What a model was trained on stays in it until it is trained anew. */
  remains: string[];
}

/** Events that extend histories; what a model has learned does not change. */
export interface EventsBody {
  events: NewEvent[];
}

/** Say what is known of an item of the list, and why it was shown. */
export interface Explain {
  tool: "explain";
  item: number;
}

/** Why the item suits the user, or what the user may write of it, in the model's words. */
export interface ExplainAnswer {
  model: ModelCard;
  notes: string[];
  prompt: string | null;
  usage: Usage;
  /** From the request's arrival to its answer. */
  milliseconds: number;
  item_id: string;
  text: string;
}

/** One an asked question, in order. */
export interface ExplainAnswers {
  answers: (ExplainAnswer | Failed)[];
}

/** The body of every answer that is not a success. */
export interface Failed {
  error: Failure;
}

/** What went wrong, for programs (``kind``) and for people (``message``). */
export interface Failure {
  kind: string;
  message: string;
  at: string | null;
}

/** Keep to items whose field has a value, has it not, or lies within a bound. */
export interface Filter {
  tool: "filter";
  field: string;
  op: "is" | "not" | "from" | "until";
  value: string;
}

/** End the turn after wishes were forgotten: the one of this number in the profile, or all of them (0). */
export interface Forget {
  tool: "forget";
  wish: number;
}

/** Items whose title, or id, holds what was searched for. */
export interface FoundItems {
  items: CatalogueItem[];
  total: number;
}

/** The process answers. */
export interface Health {
  status: "ok";
}

/** Several questions; each is answered, or fails, by itself. */
export interface ItemBatch {
  requests: ItemBody[];
}

/** A question about one item: its rating, whether it will be liked, an explanation. */
export interface ItemBody {
  model?: string | null;
  /** Of the question: it decides the order of equal scores, and of labels. */
  id?: string;
  user_id?: string | number | null;
  history?: (string | number | PastEvent)[] | null;
  profile?: string;
  /** Return what the model read, too. */
  show_prompt?: boolean;
  item_id?: string | number | null;
  /** In place of item_id: an item with its own title. */
  item?: ItemText | null;
  /** What else is told: review, feature, headline, rating. */
  context?: Record<string, string>;
}

/** An item by its id, by its title, or both; a title goes before that of the catalogue. */
export interface ItemText {
  item_id?: string | number | null;
  title?: string | null;
  fields?: Record<string, string>;
}

/** Items to add, or to replace. */
export interface ItemsBody {
  items: NewItem[];
}

export type JsonValue = unknown;

/** One event of a user. */
export interface KnownEvent {
  item_id: string;
  title: string | null;
  rating: number | null;
  timestamp: number | null;
}

/** A user's history, oldest first. */
export interface KnownUser {
  user_id: string;
  history: KnownEvent[];
}

/** What somebody said. */
export interface Line {
  role: "user" | "assistant";
  text: string;
}

/** A model that answers. */
export interface ModelCard {
  name: string;
  kind: "language model" | "classic" | "fusion";
  /** Changes with everything that can change an answer, but for the request. */
  signature: string;
  /** rank, and families of questions about an item: rating, ctr, explanation, review, stars. */
  answers: string[];
  strategies: string[];
}

/** All that answer, the default first. */
export interface Models {
  models: ModelCard[];
}

/** Something that a user did. */
export interface NewEvent {
  user_id: string | number;
  item_id: string | number;
  rating?: number | null;
  /** A number in the unit of the data (seconds), or ISO 8601, which is UTC if it names no time zone. By default now. */
  timestamp?: number | string | null;
}

/** An item of the catalogue. */
export interface NewItem {
  item_id: string | number;
  title: string;
  fields?: Record<string, string>;
}

/** One past event, oldest first in a history. */
export interface PastEvent {
  item_id?: string | number | null;
  title?: string | null;
  fields?: Record<string, string>;
  rating?: number | null;
  /** A number in the unit of the data (seconds), or ISO 8601, which is UTC if it names no time zone. */
  timestamp?: number | string | null;
}

/** How likely the user is to like or choose the item. */
export interface PredictAnswer {
  model: ModelCard;
  notes: string[];
  prompt: string | null;
  usage: Usage;
  /** From the request's arrival to its answer. */
  milliseconds: number;
  item_id: string;
  probability: number;
}

/** One an asked question, in order. */
export interface PredictAnswers {
  answers: (PredictAnswer | Failed)[];
}

/** At most so many items of a list share a value of a field. */
export interface Quota {
  field: string;
  most: number;
}

/** Order the candidates, or the whole catalogue, by the recommender; or some of the list, by their places. */
export interface Rank {
  tool: "rank";
  items: number[];
}

/** Items, best first. */
export interface RankAnswer {
  model: ModelCard;
  notes: string[];
  prompt: string | null;
  usage: Usage;
  /** From the request's arrival to its answer. */
  milliseconds: number;
  items: RankedItem[];
  /** Nothing was known of the user, and the popular list was given. */
  cold: boolean;
}

/** One an asked question, in order. */
export interface RankAnswers {
  answers: (RankAnswer | Failed)[];
}

/** Several questions; each is answered, or fails, by itself. */
export interface RankBatch {
  requests: RankBody[];
}

/** Items in order; without ``candidates`` the whole catalogue is ranked. */
export interface RankBody {
  model?: string | null;
  /** Of the question: it decides the order of equal scores, and of labels. */
  id?: string;
  user_id?: string | number | null;
  history?: (string | number | PastEvent)[] | null;
  profile?: string;
  /** Return what the model read, too. */
  show_prompt?: boolean;
  candidates?: (string | number | ItemText)[] | null;
  k?: number;
  /** How a language model orders candidates; docs/strategies.md. */
  strategy?: string;
  exclude_seen?: boolean;
  /** A sentence on each of so many first items. */
  rationale?: number;
  rules?: Rules;
}

/** One item of a list. */
export interface RankedItem {
  item_id: string;
  title: string;
  rank: number;
  /** On the model's own scale; higher is better. */
  score: number;
  rationale: string | null;
  fields: Record<string, string>;
}

/** A predicted rating on the data's own scale. */
export interface RateAnswer {
  model: ModelCard;
  notes: string[];
  prompt: string | null;
  usage: Usage;
  /** From the request's arrival to its answer. */
  milliseconds: number;
  item_id: string;
  rating: number;
  scale: [number, number] | null;
}

/** One an asked question, in order. */
export interface RateAnswers {
  answers: (RateAnswer | Failed)[];
}

/** Whether questions to models are answered now. */
export interface Ready {
  ready: boolean;
  models: string[];
}

/** How many were removed. */
export interface Removed {
  removed: number;
}

/** Texts, best first. */
export interface RerankAnswer {
  id: string;
  model: string;
  results: RerankResult[];
  usage: Record<string, number>;
  meta: Record<string, JsonValue>;
}

/**
 * Texts in, order out: the form of Cohere (v2) and of Jina.
 *
 * Keys that these have and llmrec does not are passed by.
 */
export interface RerankBody {
  model?: string | null;
  query: string;
  documents: (string | Record<string, JsonValue>)[];
  top_n?: number | null;
  return_documents?: boolean;
}

/** One text. */
export interface RerankResult {
  index: number;
  /** In [0, 1]; the scores of all texts add to 1. */
  relevance_score: number;
  document: Record<string, string> | null;
}

/**
 * Business rules, applied exactly: what a rule forbids is never in a list.
 *
 * ``only`` and ``without`` compare fields of the catalogue, such as ``category`` or ``in_stock``, with values; a field
 * that lists several values, with commas between them, matches by any of these.
 */
export interface Rules {
  only?: Record<string, string[]>;
  without?: Record<string, string[]>;
  block?: (string | number)[];
  quotas?: Quota[];
  diversity?: number;
}

/** End the turn with a fixed line. */
export interface Say {
  tool: "say";
  what: "hello" | "thanks" | "bye" | "decline" | "explained";
}

/** Find items by words. */
export interface Search {
  tool: "search";
  text: string;
  k: number;
}

/** End the turn with a list, and with a question where ``ask`` names a field. */
export interface Show {
  tool: "show";
  k: number;
  ask: string;
}

/** End the turn with the profile in words. */
export interface ShowProfile {
  tool: "profile";
}

/** Find items that are chosen together with some of the list; without places, with those that the user likes. */
export interface Similar {
  tool: "similar";
  items: number[];
}

/** Items, most alike first. */
export interface SimilarAnswer {
  model: ModelCard;
  items: RankedItem[];
  notes: string[];
  milliseconds: number;
}

/** Items like these. */
export interface SimilarBody {
  item_ids: (string | number)[];
  /** Chosen together, or described in like words. */
  by?: "interactions" | "text";
  k?: number;
  rules?: Rules;
}

/**
 * All that a conversation carries from turn to turn.
 *
 * Attributes:
 *     turn: Turns of the user so far.
 *     profile: Wishes, oldest first.
 *     buffer: Candidates, best first.
 *     query: What was searched for last; empty: nothing, or something else was asked for since.
 *     shown: The last list that was shown, to whose places the user's numbers refer.
 *     past: Every item that was shown, which is not shown again.
 *     asked: Fields that were asked about.
 *     lines: The last lines of both.
 */
export interface State {
  turn?: number;
  profile?: Wish[];
  buffer?: string[];
  query?: string;
  shown?: string[];
  past?: string[];
  asked?: string[];
  lines?: Line[];
}

/** How many were stored. */
export interface Stored {
  stored: number;
}

/** Work of a language model. */
export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  forwards: number;
}

/**
 * One thing that is known of what the user wants.
 *
 * Attributes:
 *     field: Of the catalogue's items, or `ITEM`.
 *     op: How the value is meant.
 *     value: One of the field's values, or an item's id.
 *     hard: It is a constraint; a soft wish moves the order only.
 *     source: Said by the user, concluded from it, or written into the profile by the user.
 *     turn: When, counted from 1.
 *     ban: It is a bound because something is not wanted: *nothing before 1999*.
 */
export interface Wish {
  field: string;
  op: "is" | "or" | "not" | "from" | "until" | "seen";
  value: string;
  hard?: boolean;
  source?: "said" | "inferred" | "edited";
  turn?: number;
  ban?: boolean;
}

export interface paths {
  /** Whether the process answers. */
  "GET /health": { body: undefined; answer: Health };
  /** Whether questions to models are answered now. */
  "GET /ready": { body: undefined; answer: Ready };
  /** Figures for Prometheus. */
  "GET /metrics": { body: undefined; answer: string };
  /** Rank candidates, or the whole catalogue, for a user. */
  "POST /v1/rank": { body: RankBody; answer: RankAnswer };
  /** Rank for several users. */
  "POST /v1/rank/batch": { body: RankBatch; answer: RankAnswers };
  /** Predict a user's rating of an item. */
  "POST /v1/rate": { body: ItemBody; answer: RateAnswer };
  /** Predict several ratings. */
  "POST /v1/rate/batch": { body: ItemBatch; answer: RateAnswers };
  /** Predict whether a user likes or chooses an item. */
  "POST /v1/predict": { body: ItemBody; answer: PredictAnswer };
  /** Predict several yes or no. */
  "POST /v1/predict/batch": { body: ItemBatch; answer: PredictAnswers };
  /** Say why an item suits a user; with ``Accept: text/event-stream`` as a stream of events. */
  "POST /v1/explain": { body: ItemBody; answer: ExplainAnswer };
  /** Explain several items. */
  "POST /v1/explain/batch": { body: ItemBatch; answer: ExplainAnswers };
  /** Answer a question of any family that a model was tuned on, such as a review's headline or its stars. */
  "POST /v1/ask": { body: AskBody; answer: AskAnswer };
  /** Find items like others. */
  "POST /v1/similar": { body: SimilarBody; answer: SimilarAnswer };
  /** Answer one line of a conversation; with ``Accept: text/event-stream`` calls come as events before it. */
  "POST /v1/chat": { body: ChatBody; answer: ChatAnswer };
  /** Order texts, in the form of Cohere and Jina; each line of ``query`` is a title of the history. */
  "POST /v1/rerank": { body: RerankBody; answer: RerankAnswer };
  /** Order texts, in the form of Cohere and Jina; each line of ``query`` is a title of the history. */
  "POST /v2/rerank": { body: RerankBody; answer: RerankAnswer };
  /** List the models, the default first; none while the engine starts for the first time. */
  "GET /v1/models": { body: undefined; answer: Models };
  /** Look for items by title or id. */
  "GET /v1/items": { query: { q?: string; limit?: number; offset?: number }; body: undefined; answer: FoundItems };
  /** Add or replace items; questions from then on know them. */
  "PUT /v1/items": { body: ItemsBody; answer: Stored };
  /** Return an item. */
  "GET /v1/items/{item_id}": { path: { item_id: string }; body: undefined; answer: CatalogueItem };
  /** Remove an item; no list holds it from then on. */
  "DELETE /v1/items/{item_id}": { path: { item_id: string }; body: undefined; answer: Removed };
  /** Return what a user did, oldest first. */
  "GET /v1/users/{user_id}": { path: { user_id: string }; body: undefined; answer: KnownUser };
  /** Erase a person: events, and texts about the person. */
  "DELETE /v1/users/{user_id}": { path: { user_id: string }; body: undefined; answer: Erased };
  /** Extend the histories of users; it is stored once this is answered. */
  "POST /v1/events": { body: EventsBody; answer: Stored };
  /** Read the models anew and put them in the place of those that answer meanwhile. */
  "POST /v1/reload": { body: undefined; answer: Models };
}
