// @ts-check
/**
 * The page of a service: a history on the left, what two of its models make of it on the right.
 *
 * Whatever comes from the service, from the link or from the keyboard is text. It reaches the document as text nodes
 * and as values of controls, never as markup, and no attribute that runs or loads anything is made of it. So the page
 * works under a policy that forbids inline scripts and styles.
 *
 * @typedef {{name: string, kind: string, answers: string[]}} ModelCard
 * @typedef {{id: string, rating: number | null}} Past  One event of the history.
 * @typedef {{item_id: string, title: string, fields?: Record<string, string>, image?: string | null}} Item
 * @typedef {Item & {rank: number, score: number, rationale?: string | null}} Ranked
 * @typedef {{prompt_tokens?: number, completion_tokens?: number}} Usage
 * @typedef {{notes?: string[], prompt?: string | null, milliseconds: number, usage?: Usage}} Answer
 * @typedef {Answer & {items: Ranked[], cold: boolean}} RankAnswer
 * @typedef {{item_id: string, title: string}[]} Similar  Items of the history, the most similar one first.
 * @typedef {{whom: string, left: string, right: string, preferred: "left" | "right" | "none"}} Vote  And more, to save.
 * @typedef {{body?: object, signal?: AbortSignal, stream?: boolean, onWait?: (words: string) => void}} Options
 */

const SIDES = [0, 1];
const MOST_EVENTS = 1000; // as the service takes, like the bounds in isId and isWhole
const MOST_FOUND = 20;
const MOST_NAMED = 50; // titles that are requested one by one for the ids of a link
const MOST_WAIT = 60; // seconds; longer waits need a manual retry
const KEY = "llmrec-key";
const VOTES = "llmrec-votes";
const LEAST_VOTES = 10; // before the names of a blind test are shown without being asked for
const MOST_EXPLAINED = 50; // items of a list, and of a history, so that a request stays small
const LEAST_SIMILARITY = 1e-6; // without a common user, scores have only a smaller term that breaks ties
const FACTS = { price: ["price"], category: ["category", "categories", "main_category", "genres"] };
const COUNT = new Intl.NumberFormat("en");
const SHORT = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const SCORE = new Intl.NumberFormat("en", { minimumSignificantDigits: 4, maximumSignificantDigits: 4 });

// --------------------------------------------------------------------------- the document

/** @param {string} id @returns {any} */
const $ = (id) => document.getElementById(id);

/** A copy of what a template holds. @param {string} id @returns {HTMLElement} */
const copy = (id) => $(id).content.firstElementChild.cloneNode(true);

/** @param {ParentNode} node @param {string} selector  Written out in this file. @returns {any} */
const part = (node, selector) => node.querySelector(selector);

/**
 * An element. Names of attributes are always written out in this file; children that are strings become text nodes.
 *
 * @param {string} tag @param {Record<string, string>} [attributes] @param {...(Node | string)} children @returns {any}
 */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Others' text, isolated: what runs from right to left, or overrides the direction, does not reach beyond. */
const bdi = (text, name = "") => el("bdi", { class: name }, String(text ?? ""));

/** @param {string} words @param {() => void} click @param {Record<string, string>} [attributes] */
function button(words, click, attributes = {}) {
  const made = el("button", { type: "button", ...attributes }, words);
  made.addEventListener("click", click);
  return made;
}

/** Tell those who do not see the page. @param {string} words */
const say = (words) => ($("said").textContent = words);

/** @param {string} words */
function notice(words) {
  $("notice").replaceChildren(words);
  $("notice").hidden = !words;
  if (words) say(words);
}

// --------------------------------------------------------------------------- the service

/** What the service refused, or that it cannot be reached (status 0). */
class Refused extends Error {
  /** @param {number} status @param {any} body  What was answered. @param {number | null} [wait]  Seconds. */
  constructor(status, body, wait = null) {
    super(words(status, body));
    this.status = status;
    this.at = typeof body?.error?.at === "string" ? ` (${body.error.at})` : "";
    this.wait = wait;
  }
}

/** @param {number} status @param {any} body */
function words(status, body) {
  if (status === 0) return "The service cannot be reached. Is it running?";
  if (status === 401) return key ? "This API key is not valid." : "This service requires an API key.";
  if (typeof body?.error?.message === "string" && body.error.message) return body.error.message;
  if (status === 429) return "Too many requests.";
  return status === 503 ? "The service is busy." : `The service returned an unreadable response (status ${status}).`;
}

let key = keep(KEY);

/** A text, in this tab only; where storage is switched off, until the page is left. @param {string} name @param {string} [next] */
function keep(name, next) {
  try {
    if (next) sessionStorage.setItem(name, next);
    return next ?? sessionStorage.getItem(name) ?? "";
  } catch {
    return next ?? "";
  }
}

/** @param {number} seconds @param {AbortSignal} [signal] @returns {Promise<void>} */
const pause = (seconds, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });

/** Seconds to wait for, said as a number or as a date. @param {Response} answer */
function retryAfter(answer) {
  const text = answer.headers.get("Retry-After") ?? "";
  const seconds = /^\d+$/.test(text) ? Number(text) : Math.ceil((Date.parse(text) - Date.now()) / 1000);
  return Number.isFinite(seconds) ? Math.max(1, seconds) : null;
}

/** One request. @param {string} path @param {Options} options */
async function send(path, { body, signal, stream }) {
  const headers = { Accept: stream ? "text/event-stream" : "application/json", "Content-Type": "application/json" };
  if (key) Object.assign(headers, { Authorization: `Bearer ${key}` });
  const init = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal };
  const answer = await fetch(path, init).catch((error) => {
    throw signal?.aborted ? error : new Refused(0, null);
  });
  if (answer.ok) return answer;
  const wait = [429, 503].includes(answer.status) ? retryAfter(answer) : null;
  const refused = new Refused(answer.status, await answer.json().catch(() => null), wait);
  if (answer.status === 401) {
    $("key").hidden = false;
    $("key-note").textContent = `${refused.message} The key is kept until you close this tab.`;
    if (document.activeElement === document.body) $("key-text").focus();
  }
  throw refused;
}

/** A request, made once more after the time that the service asks for. @param {string} path @param {Options} options */
async function request(path, options = {}) {
  try {
    return await send(path, options);
  } catch (error) {
    if (!(error instanceof Refused) || error.wait === null || error.wait > MOST_WAIT) throw error;
    say(`${error.message} Retrying in ${error.wait} seconds.`);
    for (let left = error.wait; left > 0; left--) {
      options.onWait?.(`${error.message} Retrying in ${left} s.`);
      await pause(1, options.signal);
    }
    options.onWait?.("Retrying…");
    return send(path, options);
  }
}

/** @param {string} path @param {Options} [options] @returns {Promise<any>} */
async function ask(path, options = {}) {
  const answer = await request(path, options);
  return answer.json().catch((error) => {
    throw options.signal?.aborted ? error : new Refused(answer.status, null);
  });
}

/** What stands under an id. Ids of dots alone would name another path, however they are written. */
const askOf = (path, id, options = {}) =>
  /^\.\.?$/.test(id) ? Promise.reject(new Refused(404, null)) : ask(path + encodeURIComponent(id), options);

/** Events of a stream, as they come. @param {Response} answer @returns {AsyncGenerator<{name: string, data: any}>} */
async function* events(answer) {
  const reader = /** @type {any} */ (answer.body).pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop() ?? "";
    for (const lines of blocks.map((block) => block.split(/\r?\n/))) {
      const of = (name) => lines.flatMap((line) => (line.startsWith(name) ? [line.slice(name.length)] : []));
      if (of("data:").length) yield { name: of("event:").join("").trim(), data: JSON.parse(of("data:").join("\n")) };
    }
  }
}

/** Like ask; `grow` gets the text piece by piece. */
async function askForText(path, options, grow) {
  const answer = await request(path, { ...options, stream: true });
  if (!answer.headers.get("Content-Type")?.startsWith("text/event-stream")) return answer.json();
  for await (const { name, data } of events(answer)) {
    if (data.error) throw new Refused(500, data);
    if (name === "done") return data;
    grow(String(data.text ?? ""));
  }
  throw new Refused(500, { error: { message: "The connection was interrupted." } });
}

/** Show a failure in its place. @param {Element} place @param {any} error @param {() => void} again */
function showError(place, error, again) {
  const known = error instanceof Refused;
  if (!known) console.warn(error);
  const text = known ? error.message : "The response could not be displayed.";
  const more = known ? `${error.at}${error.wait ? ` Retry in ${error.wait} s.` : ""}` : "";
  place.replaceChildren(el("p", { class: "error" }, bdi(text), bdi(more, "muted"), " ", button("Try again", again)));
  say(text + more);
}

// --------------------------------------------------------------------------- the state, and the link that holds it

const fresh = () => ({
  user: "",
  edited: false, // whether the known user's history was edited
  history: /** @type {Past[]} */ ([]),
  k: 10,
  seen: true, // whether seen items are excluded
  why: false,
  models: ["", ""],
  only: /** @type {string[]} */ ([]), // "field=value", like without
  without: /** @type {string[]} */ ([]),
  block: /** @type {string[]} */ ([]),
  quota: { field: "", most: "" },
  diversity: 0,
  open: ["", ""], // an item of each list
});
let state = fresh();

/** @type {Map<string, ModelCard>} */
const cards = new Map();
/** Titles by id, of all that was seen. @type {Map<string, string>} */
const titles = new Map();
/** Fields that items have. @type {Set<string>} */
const fields = new Set();

const nameOf = (id) => titles.get(id) ?? id;
const isId = (text) => /^[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,1000}$/u.test(text);
const isWhole = (text) => /^\d{1,4}$/.test(text) && Number(text) >= 1 && Number(text) <= 1000;
/** @param {string} line  "field=value" */
const splitRule = (line) => [line.split("=", 1)[0].trim(), line.slice(line.indexOf("=") + 1).trim()];
const isRule = (line) => /^[^=\n]+=[^\n]+$/.test(line) && isId(splitRule(line)[0]) && splitRule(line)[1].length <= 4000;

/** @param {Item} item */
function learn(item) {
  if (item.title) titles.set(item.item_id, item.title);
  for (const field of Object.keys(item.fields ?? {})) if (fields.size < 20 && field.length < 40) fields.add(field);
}

function link() {
  const out = new URLSearchParams();
  if (state.user) out.set("u", state.user);
  if (!state.user || state.edited) {
    for (const { id } of state.history) out.append("h", id);
    const ratings = state.history.map(({ rating }) => rating ?? "").join(",");
    if (/\d/.test(ratings)) out.set("r", ratings);
  }
  state.models.forEach((name, side) => out.set("ab"[side], name));
  if (state.k !== 10) out.set("k", String(state.k));
  if (!state.seen) out.set("seen", "0");
  if (state.why) out.set("why", "1");
  for (const name of ["only", "without", "block"]) for (const line of state[name]) out.append(name, line);
  if (state.quota.field && state.quota.most) out.set(`most.${state.quota.field}`, state.quota.most);
  if (state.diversity) out.set("diversity", String(state.diversity));
  state.open.forEach((id, side) => id && out.set(`open.${side}`, id));
  return `#${out}`;
}

/** The state that a link holds. Links come from anywhere: what is not as this page writes it is left out. */
function readLink() {
  const next = fresh();
  next.models = SIDES.map((side) => [...cards.keys()][side] ?? "");
  const given = new URLSearchParams(location.hash.slice(1));
  const ratings = (given.get("r") ?? "").split(",").map((text) => (/^-?\d+(\.\d+)?$/.test(text) ? Number(text) : null));
  let [dropped, place] = [false, 0];
  for (const [name, value] of given) {
    const [, head, field] = /** @type {string[]} */ (name.match(/^([^.]*)\.?(.*)$/s));
    const rating = head === "h" ? (ratings[place++] ?? null) : null;
    if (head === "u" && isId(value)) next.user = value;
    else if (head === "h" && isId(value) && place <= MOST_EVENTS) next.history.push({ id: value, rating });
    else if (head === "a" && cards.has(value)) next.models[0] = value;
    else if (head === "b" && (value === "" || cards.has(value))) next.models[1] = value;
    else if (head === "k" && isWhole(value)) next.k = Number(value);
    else if (head === "seen" && value === "0") next.seen = false;
    else if (head === "why" && value === "1") next.why = true;
    else if ((head === "only" || head === "without") && isRule(value)) next[head].push(value);
    else if (head === "block" && isId(value)) next.block.push(value);
    else if (head === "most" && isId(field) && isWhole(value)) next.quota = { field, most: value };
    else if (head === "diversity" && /^(1|0\.\d{1,3})$/.test(value)) next.diversity = Number(value);
    else if (head === "open" && /^[01]$/.test(field) && isId(value)) next.open[Number(field)] = value;
    else if (head !== "r") dropped = true;
  }
  next.edited = next.user !== "" && next.history.length > 0;
  return { next, dropped };
}

let writing = 0;
/** Browsers take only so many changes of the address a second. */
function writeLink() {
  clearTimeout(writing);
  writing = setTimeout(() => history.replaceState(null, "", link()), 300);
}

/** Something was changed that the lists depend on. */
function changed() {
  writeLink();
  rankSoon();
}

/** Whom a question is about, and which model answers. @param {number} side */
function about(side) {
  const own = state.user && !state.edited;
  const past = state.history.map(({ id, rating }) => (rating === null ? id : { item_id: id, rating }));
  const whom = { ...(state.user && { user_id: state.user }), ...(!own && { history: past }) };
  return { model: modelOf(side), show_prompt: !blind.on, ...whom };
}

function rules() {
  const byField = (lines) => {
    const found = new Map();
    for (const [field, value] of lines.map(splitRule)) found.set(field, [...(found.get(field) ?? []), value]);
    return Object.fromEntries(found);
  };
  const { only, without, block, diversity, quota } = state;
  const quotas = quota.field && quota.most ? [{ field: quota.field, most: Number(quota.most) }] : [];
  return { only: byField(only), without: byField(without), block, quotas, diversity };
}

// --------------------------------------------------------------------------- the history

/** @param {number} [at] @param {string} [verb]  Place and verb of the button that takes the focus. */
function drawHistory(at, verb) {
  const [list, last] = [$("events"), state.history.length - 1];
  const drawn = state.history.map(({ id, rating }, index) => {
    const row = copy("event");
    part(row, "bdi").textContent = nameOf(id);
    part(row, ".rating").textContent = rating === null ? "" : `rated ${SHORT.format(rating)}`;
    for (const tool of row.querySelectorAll("button")) {
      tool.setAttribute("aria-label", `${tool.title}: ${nameOf(id)}`);
      tool.disabled = { up: index === 0, down: index === last }[tool.dataset.verb ?? ""] ?? false;
    }
    return row;
  });
  list.replaceChildren(...drawn);
  list.hidden = last < 0;
  const count = last < 0 ? "No items yet" : last === 0 ? "1 item" : `${last + 1} items, oldest first`;
  const whom = state.user ? ["User ", bdi(state.user), state.edited ? ", edited: " : ": "] : [];
  $("whom").replaceChildren(...whom, count);
  $("clear").disabled = last < 0 && !state.user;
  if (at === undefined) return;
  // At an end the button of this direction is switched off; the next one takes the focus.
  const tools = [...(list.children[Math.min(at, last)]?.querySelectorAll("button:enabled") ?? [$("search")])];
  (tools.find((tool) => tool.dataset.verb === verb) ?? tools[0]).focus();
}

/** @param {string} message */
function edited(message) {
  if (!state.history.length) state.user = "";
  state.edited = state.user !== "";
  say(message);
  changed();
}

/** @param {number} from @param {number} to  -1: removed. @param {string} verb */
function move(from, to, verb) {
  const [past] = state.history.splice(from, 1);
  if (to >= 0) state.history.splice(to, 0, past);
  edited(`${nameOf(past.id)}${to < 0 ? " removed" : `: now ${to + 1} of ${state.history.length}`}`);
  drawHistory(to < 0 ? from : to, verb);
}

/** @param {Item[]} items */
function add(...items) {
  items.forEach(learn);
  const more = items.map(({ item_id }) => ({ id: item_id, rating: null }));
  state.history = [...state.history, ...more].slice(-MOST_EVENTS);
  edited(`Added: ${items.map(({ item_id }) => nameOf(item_id)).join(", ")}`);
  drawHistory();
  $("events").scrollTop = $("events").scrollHeight;
}

let people = new AbortController();

/** @param {string} id */
async function loadUser(id) {
  people.abort();
  const { signal } = (people = new AbortController());
  const tell = (message) => $("known-note").replaceChildren(message);
  tell("Loading…");
  try {
    const user = await askOf("v1/users/", id, { signal, onWait: tell });
    user.history.forEach(learn);
    const past = user.history.map(({ item_id, rating }) => ({ id: item_id, rating: rating ?? null }));
    Object.assign(state, { user: id, edited: false, history: past.slice(-MOST_EVENTS) });
    tell("");
    say(`User ${id}: ${state.history.length} items`);
  } catch (error) {
    if (!signal.aborted) showError($("known-note"), error, () => loadUser(id));
  }
  if (signal.aborted) return;
  drawHistory();
  $("events").scrollTop = $("events").scrollHeight;
  changed();
}

/** Ask for the titles of what a link names by id, a few at a time; without a title the id stands in its place. */
async function nameThem() {
  const { signal } = people;
  const ids = [...new Set(state.history.map(({ id }) => id))].filter((id) => !titles.has(id)).slice(-MOST_NAMED);
  while (ids.length && !signal.aborted) {
    await Promise.all(ids.splice(-4).map((id) => askOf("v1/items/", id, { signal }).then(learn, () => null)));
    if (!ids.length && !signal.aborted) drawHistory();
  }
}

// --------------------------------------------------------------------------- the search

function startSearch() {
  const [input, pop, list, note] = [$("search"), $("pop"), $("found"), $("found-note")];
  let control = new AbortController();
  let [timer, active] = [0, -1];
  /** @type {Item[]} */
  let items = [];

  const point = (index) => {
    active = index;
    [...list.children].forEach((option, at) => option.setAttribute("aria-selected", String(at === index)));
    list.children[index]?.scrollIntoView({ block: "nearest" });
    if (index < 0) input.removeAttribute("aria-activedescendant");
    else input.setAttribute("aria-activedescendant", list.children[index].id);
  };
  const open = (now) => {
    pop.hidden = !now;
    input.setAttribute("aria-expanded", String(now && items.length > 0));
    point(-1);
  };
  const close = () => {
    clearTimeout(timer);
    control.abort();
    open(false);
  };
  const choose = (index) => {
    input.value = "";
    close();
    add(items[index]);
  };
  const show = (found) => {
    items = found;
    const options = items.map(({ item_id, title }, at) => {
      const had = state.history.some(({ id }) => id === item_id) ? "in the history · " : "";
      const more = el("span", { class: "muted small" }, had, bdi(item_id));
      const option = el("li", { role: "option", id: `option-${at}` }, bdi(title, "title"), more);
      option.addEventListener("click", () => choose(at));
      return option;
    });
    list.replaceChildren(...options);
  };
  const look = async () => {
    control.abort();
    const { signal } = (control = new AbortController());
    const tell = (message) => (note.replaceChildren(message), open(true));
    if (!items.length) tell("Searching…");
    try {
      const query = new URLSearchParams({ q: input.value.trim(), limit: String(MOST_FOUND), offset: "0" });
      const found = await ask(`v1/items?${query}`, { signal, onWait: tell });
      found.items.forEach(learn);
      show(found.items);
      const more = found.total > items.length ? ": type more to narrow the search" : "";
      tell(items.length ? `${items.length} of ${COUNT.format(found.total)}${more}` : "No matching title.");
      say(note.textContent);
    } catch (error) {
      if (signal.aborted) return;
      show([]);
      open(true);
      showError(note, error, look);
    }
  };

  input.addEventListener("input", () => {
    clearTimeout(timer);
    control.abort();
    if (input.value.trim()) timer = setTimeout(look, 200);
    else close();
  });
  input.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step && pop.hidden) look();
    else if (step && items.length) point((Math.max(active, step < 0 ? 0 : -1) + step + items.length) % items.length);
    else if (event.key === "Enter" && active >= 0) choose(active);
    else if (event.key === "Escape" && !pop.hidden) close();
    else return;
    event.preventDefault();
  });
  // A click in the list leaves the focus in the field; whoever leaves both closes it.
  pop.addEventListener("mousedown", (event) => event.preventDefault());
  pop.parentElement.addEventListener("focusout", (event) => {
    if (!pop.parentElement.contains(event.relatedTarget)) close();
  });
}

// --------------------------------------------------------------------------- the rules and the other controls

/** Take what the controls say. What is not valid is marked, and does not count. */
function takeControls() {
  const whole = (id) => {
    $(id).setAttribute("aria-invalid", String(!$(id).validity.valid));
    return $(id).validity.valid;
  };
  const lines = (id, fine) => {
    const all = [...new Set($(id).value.split("\n").map((/** @type {string} */ line) => line.trim()))].filter(Boolean);
    $(id).setAttribute("aria-invalid", String(!all.every(fine)));
    return all.filter(fine).slice(0, 1000);
  };
  if (whole("k")) state.k = $("k").valueAsNumber;
  if (whole("quota-most")) state.quota = { field: $("quota-field").value.trim(), most: $("quota-most").value };
  Object.assign(state, { seen: $("seen").checked, why: $("why").checked, diversity: $("diversity").valueAsNumber });
  Object.assign(state, { only: lines("only", isRule), without: lines("without", isRule), block: lines("block", isId) });
  countRules();
  changed();
}

/** The folded part says how many rules hold, so that none is forgotten. */
function countRules() {
  const { only, without, block, diversity } = state;
  const count = only.length + without.length + block.length + rules().quotas.length + (diversity ? 1 : 0);
  $("diversity-now").textContent = String(diversity);
  $("rules-count").textContent = count ? `(${count})` : "";
}

/** Put the state into the controls. */
function drawControls() {
  for (const name of ["user", "k", "diversity"]) $(name).value = state[name];
  for (const name of ["only", "without", "block"]) $(name).value = state[name].join("\n");
  for (const name of ["seen", "why"]) $(name).checked = state[name];
  for (const name of ["field", "most"]) $(`quota-${name}`).value = state.quota[name];
  for (const side of SIDES) $(`model-${side}`).value = state.models[side];
  countRules();
  $("rules").open ||= $("rules-count").textContent !== "";
}

function startControls() {
  /** @param {string} id @param {string} event @param {(event: any) => void} take */
  const on = (id, event, take) => $(id).addEventListener(event, take);
  for (const id of ["k", "diversity"]) on(id, "input", takeControls);
  for (const id of ["seen", "why", "only", "without", "block"]) on(id, "change", takeControls);
  for (const id of ["quota-field", "quota-most"]) on(id, "change", takeControls);
  for (const side of SIDES) {
    on(`model-${side}`, "change", ({ target }) => {
      state.models[side] = target.value;
      writeLink();
      drawBlind();
      rank(side);
    });
  }
  on("events", "click", ({ target }) => {
    const [verb, row] = [target.closest("button")?.dataset.verb, target.closest("li")];
    const at = [...$("events").children].indexOf(row);
    if (verb) move(at, { up: at - 1, down: at + 1 }[verb] ?? -1, verb);
  });
  on("known", "submit", (event) => {
    event.preventDefault();
    if (isId($("user").value.trim())) loadUser($("user").value.trim());
  });
  on("clear", "click", () => {
    people.abort();
    Object.assign(state, { history: [], open: ["", ""] });
    $("user").value = "";
    $("known-note").replaceChildren();
    edited("History cleared");
    drawHistory(0);
  });
  on("example", "click", async () => {
    const note = $("welcome-note");
    try {
      const { items } = await ask("v1/items?limit=3", { onWait: (message) => note.replaceChildren(message) });
      note.replaceChildren(items.length ? "" : "The catalogue is empty.");
      if (items.length) add(...items);
    } catch (error) {
      showError(note, error, () => $("example").click());
    }
  });
  on("key", "submit", (event) => {
    event.preventDefault();
    const text = $("key-text").value.trim();
    $("key-note").textContent = "An API key has only ASCII characters and no spaces.";
    if (!/^[\x21-\x7e]+$/.test(text)) return; // nothing else can stand in a header
    key = keep(KEY, text);
    $("key-text").value = "";
    $("key").hidden = true;
    if (cards.size) history.replaceState(null, "", link());
    start();
  });
  on("skip", "click", (event) => {
    event.preventDefault(); // the part of the address behind # holds the state
    $("lists-title").focus();
  });
}

// --------------------------------------------------------------------------- the two lists

/** @type {(RankAnswer | null)[]} */
const answers = [null, null];
/** Answers that are not shown yet. @type {(RankAnswer | null)[]} */
const arrived = [null, null];
const waiting = [false, false];
const running = SIDES.map(() => new AbortController());
const asking = SIDES.map(() => new AbortController()); // questions about the open item
/** Rows by id. @type {Map<string, HTMLElement>[]} */
const rows = [new Map(), new Map()];
let soon = 0;

/** Answers to an earlier state are not wanted any more; the new ones are asked for after a moment without changes. */
function rankSoon() {
  clearTimeout(soon);
  for (const control of [...running, ...asking]) control.abort();
  if (blind.on) answers.fill(null); // no vote on the lists of an earlier user
  drawBallot();
  soon = setTimeout(() => SIDES.forEach(rank), 250);
}

/** @param {number} side */
async function rank(side) {
  running[side].abort();
  const { signal } = (running[side] = new AbortController());
  const anyone = hasAnyone();
  if (blind.on) shuffle();
  const [card, place, list] = [cards.get(modelOf(side)), $(`state-${side}`), $(`list-${side}`)];
  $("welcome").hidden = anyone || !cards.size;
  $("columns").hidden = !anyone;
  answers[side] = arrived[side] = null;
  waiting[side] = anyone && card !== undefined;
  mark();
  drawBallot();
  place.replaceChildren(waiting[side] ? "Ranking…" : "");
  if (waiting[side]) {
    list.setAttribute("aria-busy", "true");
    const rationale = state.why && !blind.on && card?.kind !== "classic" ? 3 : 0;
    const body = { ...about(side), k: state.k, exclude_seen: state.seen, rationale, rules: rules() };
    try {
      arrived[side] = await ask("v1/rank", { body, signal, onWait: (message) => place.replaceChildren(message) });
    } catch (error) {
      if (signal.aborted) return;
      // A message may name the model, which the reader of a blind test must not know.
      const message = { error: { message: "This list cannot be shown." } };
      showError(place, blind.on ? new Refused(500, message) : error, () => rank(side));
    }
    waiting[side] = false;
  }
  // In a blind test both lists appear at once, so that the faster model cannot be recognised.
  if (!blind.on) settle(side);
  else if (!waiting.some(Boolean)) SIDES.forEach(settle);
}

/** Show the answer of a model. @param {number} side */
function settle(side) {
  const answer = (answers[side] = arrived[side]);
  $(`list-${side}`).removeAttribute("aria-busy");
  if (answer) {
    $(`state-${side}`).replaceChildren(answer.items.length ? "" : "No items left: the rules and seen items exclude all of them.");
  }
  drawList(side);
  mark();
  drawBallot();
  const done = answers.flatMap((one, at) => (one ? [`${nameOfList(at)}: ${one.items.length} items`] : []));
  if (done.length && !document.querySelector(".ranked[aria-busy]")) say([...done, $("shared").textContent].join(". "));
  if (answer) explainBySimilar(side, answer);
}

/** Say which items of the history each item of a list is most similar to. @param {number} side @param {RankAnswer} answer */
async function explainBySimilar(side, answer) {
  const { signal } = running[side];
  const past = [...new Set(state.history.map(({ id }) => id))].slice(-MOST_EXPLAINED);
  const items = answer.items.slice(0, MOST_EXPLAINED);
  if (!past.length || !items.length) return;
  const ask3 = (by) => ({
    requests: items.map(({ item_id }) => ({ item_ids: [item_id], by, candidates: past, k: 4 })),
  });
  const asked = async (by) => (await ask("v1/similar/batch", { body: ask3(by), signal })).answers;
  try {
    let [by, found] = ["interactions", await asked("interactions")];
    // A model without interactions has only texts.
    if (found.every((each) => each.error)) [by, found] = ["text", await asked("text")];
    items.forEach(({ item_id }, at) => {
      const similar = (found[at].items ?? []).filter((each) => each.item_id !== item_id && each.score > LEAST_SIMILARITY);
      drawBecause(rows[side].get(item_id), similar.slice(0, 3), by);
    });
  } catch (error) {
    if (!signal.aborted) for (const row of rows[side].values()) part(row, ".because").replaceChildren();
  }
}

/** @param {HTMLElement | undefined} row @param {Similar} similar @param {string} by */
function drawBecause(row, similar, by) {
  if (!row) return;
  const names = similar.flatMap(({ item_id, title }, at) => [at ? " · " : "", bdi(title || item_id)]);
  const how = by === "text" ? " (most similar texts)" : " (chosen by the same users)";
  const words = names.length ? ["Because of ", ...names, el("span", { class: "how" }, how)] : ["No similar item in the history"];
  part(row, ".because").replaceChildren(...words);
  part(row, ".because").title = part(row, ".because").textContent; // in a closed row it is cut to one line
}

/** What an answer cost. @param {Answer} answer */
function cost({ milliseconds, usage }) {
  const [read, written] = [usage?.prompt_tokens ?? 0, usage?.completion_tokens ?? 0];
  const tokens = read || written ? ` · ${COUNT.format(read)} tokens read, ${COUNT.format(written)} written` : "";
  return `${SHORT.format(milliseconds)} ms${tokens}`;
}

/** Notes, and what the model read. @param {Answer} answer @returns {Node[]} */
function aside({ notes, prompt }) {
  const list = el("ul", { class: "notes" }, ...(notes ?? []).map((note) => el("li", {}, bdi(note))));
  const pre = el("pre", { tabindex: "0", dir: "auto", "aria-label": "Prompt" }, prompt ?? "");
  return [list, ...(prompt ? [el("details", {}, el("summary", {}, "Prompt"), pre)] : [])];
}

/** @param {number} side */
function drawList(side) {
  const [answer, list, focus] = [answers[side], $(`list-${side}`), document.activeElement];
  const focused = list.contains(focus) ? [...list.children].indexOf(focus?.closest(".ranked > li")) : null;
  const items = answer?.items ?? [];
  items.forEach(learn);
  $("fields").replaceChildren(fields.size ? "Fields: " : "", bdi([...fields].sort().join(", ")));
  const scores = items.map(({ score }) => score);
  const [least, most] = [Math.min(...scores), Math.max(...scores)];
  const shareOf = (score) => (most > least ? (score - least) / (most - least) : 1);
  rows[side] = new Map(items.map((item) => [item.item_id, rowOf(side, item, shareOf(item.score))]));
  // Each row has room for what others have, so that nothing moves when images and explanations arrive.
  list.classList.toggle("pictured", items.some(({ image }) => isImage(image)));
  list.classList.toggle("explained", state.history.length > 0);
  list.replaceChildren(...rows[side].values());
  if (rows[side].has(state.open[side])) openItem(side, state.open[side]);
  const cold = answer?.cold ? "popular items" : "";
  const kind = cards.get(modelOf(side))?.kind;
  const meta = blind.on ? [cold] : [kind, answer && cost(answer), cold];
  $(`meta-${side}`).replaceChildren(meta.filter(Boolean).join(" · "));
  $(`foot-${side}`).replaceChildren(...(answer && !blind.on ? aside(answer) : []));
  // What had the focus went with the old list.
  if (focused !== null) (list.children[focused]?.firstElementChild ?? list).focus();
}

/** @param {number} score */
function scoreText(score) {
  return score !== 0 && Math.abs(score) < 1e-4 ? score.toExponential(2) : SCORE.format(score);
}

/** Only addresses of the web: the service checks them too, and the policy of this page allows only its images' hosts. */
const isImage = (url) => typeof url === "string" && /^https?:\/\/[^\s"<>\\]+$/i.test(url);

/** The image of an item, or nothing. @param {Item} item @param {number} size  In pixels. @returns {Node[]} */
function pictureOf({ item_id, title, image }, size) {
  if (!isImage(image)) return [];
  const pixels = String(size);
  const hints = { loading: "lazy", decoding: "async", referrerpolicy: "no-referrer" };
  const img = el("img", { alt: title || item_id, width: pixels, height: pixels, ...hints });
  img.addEventListener("error", () => img.remove());
  img.src = image;
  return [img];
}

/** The price and the category of an item, each with a name for screen readers. @param {Item} item @returns {Node[]} */
function factsOf({ fields: values }) {
  return Object.entries(FACTS).flatMap(([name, keys]) => {
    const value = keys.map((field) => values?.[field]).find(Boolean);
    // A number alone says too little.
    const label = el("span", { class: name === "price" && /^[\d.,]+$/.test(value ?? "") ? "" : "sr" }, ` ${name} `);
    return value ? [el("span", { class: name }, label, bdi(value))] : [];
  });
}

/** @param {number} side @param {Ranked} item @param {number} share  Of the way from the lowest score to the highest. */
function rowOf(side, item, share) {
  const { item_id, title, rank, score, rationale } = item;
  const row = copy("row");
  part(row, ".rank").textContent = String(rank);
  part(row, ".title").textContent = title || item_id;
  part(row, ".picture").append(...pictureOf(item, 40));
  part(row, ".facts").append(...factsOf(item));
  if (blind.on) part(row, ".score").remove(); // its distribution may tell the models apart
  else {
    part(row, ".score").title = `Score of the model: ${scoreText(score)}`;
    part(row, ".number").textContent = String(Math.round(100 * share));
    part(row, ".fill").style.setProperty("width", `${Math.round(4 + 96 * share)}%`);
  }
  part(row, ".why").hidden = !rationale;
  part(row, ".why bdi").textContent = rationale ?? "";
  part(row, ".open").addEventListener("click", () => {
    openItem(side, state.open[side] === item_id ? "" : item_id);
    writeLink();
  });
  for (const [event, on] of Object.entries({ mouseenter: true, mouseleave: false, focusin: true, focusout: false })) {
    row.addEventListener(event, () => rows[1 - side].get(item_id)?.classList.toggle("twin", on));
  }
  return row;
}

/** Open one item of a list, and close the one before. @param {number} side @param {string} id  None: "". */
function openItem(side, id) {
  asking[side].abort();
  state.open[side] = id;
  for (const item of answers[side]?.items ?? []) {
    const row = /** @type {HTMLElement} */ (rows[side].get(item.item_id));
    const now = item.item_id === id;
    part(row, ".open").setAttribute("aria-expanded", String(now));
    part(row, ".detail").hidden = !now;
    part(row, ".detail").replaceChildren(...(now ? detail(side, item) : []));
  }
}

/** Mark where items stand in the other list, in signs and in words. */
function mark() {
  const both = answers[0] !== null && answers[1] !== null;
  const signs = both && !blind.on;
  const ranks = answers.map((answer) => new Map(answer?.items.map((item) => [item.item_id, item.rank])));
  for (const side of SIDES) {
    for (const [id, row] of rows[side]) {
      const there = ranks[1 - side].get(id);
      const up = (there ?? 0) - (ranks[side].get(id) ?? 0);
      const way = there === undefined ? "only" : up > 0 ? "up" : up < 0 ? "down" : "same";
      const text = there === undefined ? "not in the other list" : `rank ${there} in the other list`;
      const sign = { only: "only", same: "=", up: `↑${up}`, down: `↓${-up}` }[way];
      const seen = el("span", { class: `mark ${way}`, title: text, "aria-hidden": "true" }, sign);
      part(row, ".marks").replaceChildren(...(signs ? [seen, el("span", { class: "sr" }, `, ${text}, `)] : []));
    }
  }
  const shared = [...ranks[0].keys()].filter((id) => ranks[1].has(id)).length;
  $("shared").textContent = both ? `${shared} ${shared === 1 ? "item" : "items"} in both lists` : "";
  $("legend").hidden = !signs;
  $("scale").hidden = blind.on || !answers.some((answer) => answer?.items.length);
}

// --------------------------------------------------------------------------- one item

/** What can be asked about an item, and how the answer is shown. */
const QUESTIONS = [
  {
    verb: "rate",
    family: "rating",
    title: "Rate",
    show: ({ rating, scale }) => {
      const ends = scale?.map((end) => SHORT.format(end));
      return [el("strong", {}, SHORT.format(rating)), ends ? ` on a scale from ${ends[0]} to ${ends[1]}` : ""];
    },
  },
  {
    verb: "predict",
    family: "ctr",
    title: "Will they like it?",
    show: ({ probability }) => [el("strong", {}, `${SHORT.format(100 * probability)}%`), " likely to like it"],
  },
  { verb: "explain", family: "explanation", title: "Explain", show: ({ text }) => [bdi(text, "prose")] },
  { verb: "similar", by: "interactions", title: "Similar by interactions", show: showSimilar },
  { verb: "similar", by: "text", title: "Similar by text", show: showSimilar },
];

/** @param {{items: Ranked[]}} answer */
function showSimilar({ items }) {
  items.forEach(learn);
  const list = items.map((item) => {
    const label = { class: "tool", title: "Add to the history", "aria-label": `Add to the history: ${item.title}` };
    return el("li", {}, bdi(item.title || item.item_id), button("+", () => add(item), label));
  });
  return [list.length ? el("ol", {}, ...list) : "None found."];
}

/** An item, and what can be asked about it; answers appear below. @param {number} side @param {Ranked} item */
function detail(side, item) {
  const { signal } = (asking[side] = new AbortController());
  const below = el("div", { class: "answers" });
  // In a blind test, what a model can answer would tell which one it is.
  const can = (blind.on ? [] : cards.get(modelOf(side))?.answers) ?? [];
  const block = () => {
    $("block").value += `${$("block").value ? "\n" : ""}${item.item_id}`;
    takeControls();
  };
  const tools = [
    ...QUESTIONS.filter(({ family }) => !family || can.includes(family)).map((each) => questionOf(side, item, each, below, signal)),
    button("Add to the history", () => add(item)),
    button("Block", block),
  ];
  const list = el("dl", { class: "fields" });
  const show = (values) => {
    const score = blind.on ? [] : [["score of the model", scoreText(item.score)]];
    const pairs = [["id", item.item_id], ...score, ...Object.entries(values ?? {})];
    const drawn = pairs.map(([name, value]) => el("div", {}, el("dt", {}, bdi(name)), el("dd", {}, bdi(value))));
    list.replaceChildren(...drawn);
  };
  show(item.fields);
  if (Object.keys(item.fields ?? {}).length === 0) {
    askOf("v1/items/", item.item_id, { signal }).then((full) => show(full.fields), () => null);
  }
  return [...pictureOf(item, 160), list, el("div", { class: "verbs" }, ...tools), below];
}

/**
 * A button that asks; its answer takes the place of the one before.
 *
 * @param {number} side @param {Ranked} item @param {typeof QUESTIONS[number]} question
 * @param {HTMLElement} below @param {AbortSignal} signal
 */
function questionOf(side, item, question, below, signal) {
  const { verb, by, title, show } = question;
  /** @type {HTMLElement | null} */
  let last = null;
  const click = async () => {
    if (last?.hasAttribute("aria-busy")) return;
    last?.remove();
    const block = (last = copy("answer"));
    const [body, prose] = [part(block, ".body"), bdi("", "prose")];
    part(block, "h3").textContent = title;
    below.append(block);
    const similar = { item_ids: [item.item_id], by, k: 5, rules: rules() };
    const asked = by ? similar : { ...about(side), item_id: item.item_id };
    const options = { body: asked, signal, onWait: (message) => body.replaceChildren(message) };
    const grow = (text) => (prose.append(text), prose.isConnected || body.replaceChildren(prose));
    try {
      const call = /** @type {Function} */ (verb === "explain" ? askForText : ask);
      const answer = await call(`v1/${verb}`, options, grow);
      body.replaceChildren(...show(answer));
      part(block, ".cost").textContent = cost(answer);
      part(block, ".aside").replaceChildren(...aside(answer));
      say(`${title}: ${body.textContent}`);
    } catch (error) {
      if (signal.aborted) block.remove();
      else showError(body, error, click);
    }
    block.removeAttribute("aria-busy");
  };
  return button(title, click);
}

// --------------------------------------------------------------------------- the blind test

const blind = {
  on: false,
  whom: "", // the user or history that the order of the lists was drawn for
  flip: false, // whether the second model is on the left
  shown: false, // whether the names were asked for
  tried: new Set(), // users of the queue that were loaded
  votes: readVotes(),
};

/** The model of a list. @param {number} side */
function modelOf(side) {
  return state.models[blind.on && blind.flip ? 1 - side : side];
}

/** @param {number} side */
const nameOfList = (side) => (blind.on ? `List ${"AB"[side]}` : state.models[side]);

const hasAnyone = () => state.user !== "" || state.history.length > 0;
const whom = () => JSON.stringify(state.user && !state.edited ? [state.user] : ["", ...state.history.map(({ id }) => id)]);

/** Votes of this tab; what is not as this page writes it is left out. @returns {Vote[]} */
function readVotes() {
  try {
    const isVote = (vote) =>
      ["whom", "left", "right"].every((name) => typeof vote?.[name] === "string") &&
      ["left", "right", "none"].includes(vote.preferred);
    return JSON.parse(keep(VOTES) || "[]").filter(isVote);
  } catch {
    return [];
  }
}

/** Votes on the two models that are chosen. */
function votesNow() {
  const pair = [...state.models].sort().join("\n");
  return blind.votes.filter(({ left, right }) => [left, right].sort().join("\n") === pair);
}

const voteOn = (id) => votesNow().find((vote) => vote.whom === id);

/** Draw the order of the lists, once for each user; a user who comes again has the same order. */
function shuffle() {
  if (blind.whom === whom()) return;
  blind.whom = whom();
  const before = voteOn(blind.whom);
  blind.flip = before ? before.left !== state.models[0] : crypto.getRandomValues(new Uint8Array(1))[0] % 2 === 1;
}

/** @param {boolean} on */
function setBlind(on) {
  Object.assign(blind, { on, whom: "", shown: false });
  blind.tried.clear();
  Object.assign(state, { open: ["", ""] });
  drawBlind();
  SIDES.forEach((side) => $(`list-${side}`).replaceChildren());
  SIDES.forEach(rank);
  $(on ? "blind-title" : "blind-start").focus();
}

/** What the blind test shows apart from the lists. */
function drawBlind() {
  const two = cards.size > 1 && state.models[1] !== "" && state.models[0] !== state.models[1];
  $("blind-start").hidden = $("why-label").hidden = blind.on;
  $("blind-start").disabled = !two;
  $("blind-start").title = two ? "" : "Choose two different models";
  $("blind").hidden = !blind.on;
  for (const side of SIDES) {
    $(`model-${side}`).hidden = blind.on;
    $(`label-${side}`).textContent = blind.on ? nameOfList(side) : ["First model", "Second model"][side];
  }
  drawBallot();
  drawTally();
}

/** The buttons to vote with; they keep the focus while lists load. */
function drawBallot() {
  const ready = answers.every((answer) => answer?.items.length);
  const before = blind.on ? voteOn(whom()) : undefined;
  $("ballot").hidden = !blind.on || !hasAnyone();
  for (const choice of $("ballot").querySelectorAll("button")) {
    choice.setAttribute("aria-disabled", String(!ready));
    choice.setAttribute("aria-pressed", String(before?.preferred === choice.dataset.vote));
  }
  $("next").setAttribute("aria-disabled", String(!queue().length));
  const note = before ? "Judged. A new vote replaces this one." : "Not judged yet.";
  $("blind-note").textContent = hasAnyone() ? note : "Load a user or add items.";
}

/** Users who are left to judge. @returns {string[]} */
function queue() {
  const ids = $("queue").value.split("\n").map((/** @type {string} */ line) => line.trim());
  return [...new Set(ids)].filter((id) => isId(id) && !blind.tried.has(id) && !voteOn(JSON.stringify([id])));
}

/** Load another user of the queue, in random order. */
function nextUser() {
  const ids = queue();
  if (!ids.length) return;
  const id = ids[crypto.getRandomValues(new Uint32Array(1))[0] % ids.length];
  blind.tried.add(id);
  $("user").value = id;
  loadUser(id);
}

/** @param {"left" | "right" | "none"} preferred */
function vote(preferred) {
  const [left, right] = SIDES.map(modelOf);
  const lists = answers.map((answer) => answer?.items.map(({ item_id }) => item_id));
  const made = {
    whom: whom(),
    left,
    right,
    preferred,
    lists: { left: lists[0], right: lists[1] },
    signatures: { left: cards.get(left)?.signature, right: cards.get(right)?.signature },
    settings: { k: state.k, exclude_seen: state.seen, rules: rules() },
    time: new Date().toISOString(),
  };
  blind.votes = [...blind.votes.filter((each) => each !== voteOn(made.whom)), made];
  keep(VOTES, JSON.stringify(blind.votes));
  drawBallot();
  drawTally();
  say(`Vote counted: ${{ left: "list A", right: "list B", none: "no difference" }[preferred]}. ${$("tally").textContent}`);
  nextUser();
}

let tallying = new AbortController();

/** How many votes there are, and from the tenth on, or on request, for which model. */
async function drawTally() {
  tallying.abort();
  const { signal } = (tallying = new AbortController());
  const [votes, place] = [votesNow(), $("tally")];
  const shown = votes.length > 0 && (blind.shown || votes.length >= LEAST_VOTES);
  $("reveal").hidden = shown || !votes.length;
  $("votes-save").hidden = !shown;
  $("votes-clear").hidden = !votes.length;
  const count = votes.length === 1 ? "1 vote" : `${votes.length} votes`;
  if (!shown) return place.replaceChildren(`${count}. The names are shown after ${LEAST_VOTES} votes.`);
  const [first, second] = state.models.map((name) => votes.filter((each) => each.preferred !== "none" && each[each.preferred] === name).length);
  const [a, b] = state.models;
  const counts = [[a, first], [b, second], ["No difference", votes.length - first - second]];
  const list = el("dl", { class: "counts" }, ...counts.map(([name, n]) => el("div", {}, el("dt", {}, bdi(name)), el("dd", {}, String(n)))));
  place.replaceChildren(list);
  if (!(first + second)) return place.append(el("p", {}, "No vote prefers a model yet."));
  try {
    const { share, low, high } = await ask(`v1/preference?first=${first}&second=${second}`, { signal });
    const [percent, from, to] = [share, low, high].map((part) => Math.round(100 * part));
    const verdict = `${low > 0.5 || high < 0.5 ? "a" : "no"} significant difference`;
    const band = el("span", { class: "band" });
    band.style.setProperty("left", `${100 * low}%`);
    band.style.setProperty("width", `${100 * (high - low)}%`);
    const dot = el("span", { class: "dot" });
    dot.style.setProperty("left", `${100 * share}%`);
    const sentence = ["Of ", String(first + second), first + second === 1 ? " vote for a model, " : " votes for a model, ", `${percent}% prefer `, bdi(a), ` (95% confidence interval ${from}% to ${to}%): ${verdict}.`];
    place.append(el("div", { class: "interval", "aria-hidden": "true" }, band, dot), el("p", {}, ...sentence));
  } catch (error) {
    if (!signal.aborted) place.append(el("p", {}, "The interval cannot be computed now."));
  }
}

function saveVotes() {
  const url = URL.createObjectURL(new Blob([JSON.stringify(votesNow(), null, 1)], { type: "application/json" }));
  const anchor = el("a", { download: "llmrec-votes.json" });
  anchor.href = url;
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

function clearVotes() {
  const gone = new Set(votesNow());
  Object.assign(blind, { votes: blind.votes.filter((each) => !gone.has(each)), shown: false, whom: "" });
  blind.tried.clear();
  keep(VOTES, JSON.stringify(blind.votes));
  drawBlind();
  if (blind.on) SIDES.forEach(rank); // in a new order: the names may have been shown
  $("blind-title").focus(); // the button is hidden
  say("Votes deleted");
}

function startBlind() {
  $("blind-start").addEventListener("click", () => setBlind(true));
  $("blind-end").addEventListener("click", () => setBlind(false));
  $("queue").addEventListener("input", drawBallot);
  $("next").addEventListener("click", nextUser);
  $("votes-save").addEventListener("click", saveVotes);
  $("votes-clear").addEventListener("click", clearVotes);
  $("reveal").addEventListener("click", () => {
    blind.shown = true;
    drawTally();
    $("votes-save").focus();
  });
  $("ballot").addEventListener("click", ({ target }) => {
    const choice = target.closest("button");
    if (choice && choice.getAttribute("aria-disabled") === "false") vote(choice.dataset.vote);
  });
}

// --------------------------------------------------------------------------- the start

let starting = new AbortController();

/** Wait until the service has its models, ask which there are, then follow the link. */
async function start() {
  starting.abort();
  const { signal } = (starting = new AbortController());
  $("shared").textContent = "Connecting…";
  try {
    for (;;) {
      const answer = await fetch("ready", { signal }).catch(() => null);
      const body = await answer?.json().catch(() => null);
      // If this fails, the request for the models reports why.
      if (!answer || (answer.status !== 503 && body?.ready !== false)) break;
      notice("The service is loading its models. Retrying every few seconds.");
      await pause(Math.min(retryAfter(answer) ?? 3, 10), signal);
    }
    const { models } = await ask("v1/models", { signal, onWait: notice });
    cards.clear();
    for (const card of models) if (card.answers.includes("rank")) cards.set(card.name, card);
  } catch (error) {
    if (signal.aborted) return;
    const forKey = error instanceof Refused && error.status === 401; // has a separate form
    notice(forKey ? "" : "…");
    return forKey || showError($("notice"), error, start);
  } finally {
    $("shared").textContent = "";
  }
  for (const side of SIDES) {
    const names = [...cards.keys(), ...(side ? [""] : [])];
    $(`model-${side}`).replaceChildren(...names.map((value) => el("option", { value }, value || "(none)")));
  }
  follow();
}

/** Take the state from the link. */
function follow() {
  people.abort();
  people = new AbortController();
  clearTimeout(writing);
  const { next, dropped } = readLink();
  state = next;
  blind.whom = "";
  if (blind.on) answers.fill(null); // lists of the last user take no votes
  if (!cards.size) notice("No model of this service ranks items.");
  else notice(dropped ? "Some settings of the link are unknown here and were ignored." : "");
  drawControls();
  drawBlind();
  drawHistory();
  if (state.user && !state.edited) return void loadUser(state.user);
  SIDES.forEach(rank);
  nameThem();
}

startSearch();
startControls();
startBlind();
window.addEventListener("hashchange", () => cards.size && follow());
start();
