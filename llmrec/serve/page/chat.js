// The page of a conversation: sends messages to POST /v1/chat and shows answers, lists and the profile.
//
// The state of a conversation is stored only here, and sent to the service with each message. Texts of the service are set as text, never as HTML.

const KEY = "llmrec-key"; // as on the other page: in this tab only
const $ = (id) => document.getElementById(id);

let state = null;
let begun = 0; // conversations that were forgotten
let key = "";
try {
  key = sessionStorage.getItem(KEY) ?? "";
} catch {
  // Storage is disabled: the user enters the key again.
}

/** An element with text. @param {string} tag @param {string} text @param {string} [name] */
function el(tag, text, name) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

/** Events of a stream, as they come. @param {Response} answer */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop() ?? "";
    for (const block of blocks) {
      const of = (name) => block.split(/\r?\n/).flatMap((line) => (line.startsWith(name) ? [line.slice(name.length)] : []));
      if (of("data:").length) yield { name: of("event:").join("").trim(), data: JSON.parse(of("data:").join("\n")) };
    }
  }
}

/** Ask for the answer to one line; `called` gets each call. @param {string} text @param {(call: any) => void} called */
async function answerTo(text, called) {
  const headers = { Accept: "text/event-stream", "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const body = JSON.stringify(state ? { text, state } : { text });
  const answer = await fetch("v1/chat", { method: "POST", headers, body });
  if (!answer.ok) {
    if (answer.status === 401) $("key").hidden = false;
    const failure = await answer.json().catch(() => null);
    throw new Error(failure?.error?.message ?? `The service returned status ${answer.status}.`);
  }
  for await (const { name, data } of events(answer)) {
    if (data.error) throw new Error(data.error.message);
    if (name === "done") return data;
    called(data);
  }
  throw new Error("The connection was interrupted.");
}

/** A list of items, each with what can be asked about it. @param {any[]} items */
function listOf(items) {
  const list = el("ol", "", "found");
  items.forEach((item, at) => {
    const row = el("li", "");
    const what = el("div", "");
    const values = Object.entries(item.fields ?? {}).map(([name, value]) => `${name}: ${value}`);
    const title = el("div", "", "title");
    title.append(el("bdi", item.title));
    what.append(title);
    if (values.length) {
      const fields = el("div", "", "title small muted");
      fields.append(el("bdi", values.join("; ")));
      what.append(fields);
    }
    const verbs = el("div", "", "verbs");
    // Positions, not titles: a title would be parsed as a wish.
    for (const [label, line] of [["Why?", `why number ${at + 1}?`], ["More like it", `something like number ${at + 1}`]]) {
      const verb = el("button", label);
      verb.type = "button";
      verb.setAttribute("aria-label", `${label} Item ${at + 1}`);
      verb.addEventListener("click", () => say(line));
      verbs.append(verb);
    }
    row.append(el("span", `${at + 1}`, "rank"), what, verbs);
    list.append(row);
  });
  return list;
}

/** Show an answer: its lines, and its list where the text has that. @param {Element} turn @param {any} found */
function drawAnswer(turn, found) {
  const lines = found.text.split("\n");
  const first = found.items.length ? lines.findIndex((line) => line.startsWith("1. ")) : -1;
  const shown = first >= 0 && lines.length >= first + found.items.length;
  if (shown) {
    // Only the latest list is numbered for the service.
    for (const verb of document.querySelectorAll(".found button")) verb.disabled = true;
  }
  lines.forEach((line, at) => {
    if (shown && at === first) turn.append(listOf(found.items));
    if (!shown || at < first || at >= first + found.items.length) turn.append(el("p", line));
  });
}

/** Show the profile, one wish per line with a button that deletes it. @param {string[]} wishes */
function drawProfile(wishes) {
  $("profile").replaceChildren(
    ...wishes.map((line, at) => {
      const row = el("li", "");
      const wish = el("bdi", line.replace(/^\d+\. /, ""));
      const gone = el("button", "×", "tool");
      gone.type = "button";
      gone.title = "Forget this";
      gone.setAttribute("aria-label", `Forget: ${wish.textContent}`);
      gone.addEventListener("click", () => {
        const kept = (each, place) => place !== at;
        state = { ...state, profile: state.profile.filter(kept), buffer: [] };
        drawProfile(wishes.filter(kept));
        ($("profile").querySelectorAll("button")[Math.min(at, wishes.length - 2)] ?? $("text")).focus();
      });
      row.append(wish, gone);
      return row;
    }),
  );
  $("clear").disabled = state === null;
}

/** Let one line be answered at a time, during which the state is not changed. @param {boolean} busy */
function setBusy(busy) {
  $("say").querySelector("button").disabled = busy;
  for (const gone of $("profile").querySelectorAll("button")) gone.disabled = busy;
}

/** Say a line, and show what is answered. @param {string} text */
async function say(text) {
  if (!text || $("say").querySelector("button").disabled) return;
  setBusy(true);
  const at = begun;
  const turn = el("div", "", "turn");
  turn.append(el("p", text, "said"));
  $("lines").append(turn);
  $("failed").hidden = true;
  try {
    const found = await answerTo(text, (call) => ($("state").textContent = `${call.tool} …`));
    $("state").textContent = "";
    if (at !== begun) return;
    state = found.state;
    drawAnswer(turn, found);
    drawProfile(found.profile);
    if ($("text").value.trim() === text) $("text").value = "";
    $("state").textContent = `${Math.round(found.milliseconds)} ms`;
  } catch (error) {
    // Without an answer the message stays in the field.
    turn.remove();
    $("state").textContent = "";
    if (at !== begun) return;
    $("text").value ||= text;
    $("failed").textContent = error instanceof Error ? error.message : "No response.";
    $("failed").hidden = false;
  } finally {
    setBusy(false);
    $("text").focus({ preventScroll: true });
    turn.scrollIntoView({ block: "nearest" });
  }
}

$("say").addEventListener("submit", (event) => {
  event.preventDefault();
  say($("text").value.trim());
});

$("clear").addEventListener("click", () => {
  // The whole state, since messages and lists are user data too, including a pending answer.
  state = null;
  begun += 1;
  $("lines").replaceChildren();
  $("failed").hidden = true;
  drawProfile([]);
  $("text").focus();
});

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key-text").value;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // It is kept until the page is closed.
  }
  $("key").hidden = true;
  $("text").focus();
});
