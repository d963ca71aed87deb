// The page of a conversation: says lines to POST /v1/chat and shows answers, lists and the profile.
//
// The state of a conversation is kept here alone, and goes to the service with each line. All that comes from the service is set as text, never as HTML.
// This page was not driven in a browser.

const KEY = "llmrec-key"; // as on the other page: in this tab only
const $ = (id) => document.getElementById(id);

let state = null;
let begun = 0; // conversations that were forgotten
let key = "";
try {
  key = sessionStorage.getItem(KEY) ?? "";
} catch {
  // Storage is switched off: the key is asked for anew.
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
    const told = await answer.json().catch(() => null);
    throw new Error(told?.error?.message ?? `The service answered with ${answer.status}.`);
  }
  for await (const { name, data } of events(answer)) {
    if (data.error) throw new Error(data.error.message);
    if (name === "done") return data;
    called(data);
  }
  throw new Error("The answer broke off.");
}

/** Show the profile, a wish a line, each of which can be deleted. @param {string[]} told */
function drawProfile(told) {
  $("profile").replaceChildren(
    ...told.map((line, at) => {
      const row = el("li", line.replace(/^\d+\. /, ""));
      const gone = el("button", "×", "tool");
      gone.type = "button";
      gone.title = "Forget this";
      gone.addEventListener("click", () => {
        const kept = (each, place) => place !== at;
        state = { ...state, profile: state.profile.filter(kept), buffer: [] };
        drawProfile(told.filter(kept));
      });
      row.append(" ", gone);
      return row;
    }),
  );
  $("clear").disabled = state === null;
}

$("say").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  const button = $("say").querySelector("button");
  if (!text || button.disabled) return;
  button.disabled = true;
  const at = begun;
  $("lines").append(el("p", `You: ${text}`, "muted"));
  try {
    const found = await answerTo(text, (call) => ($("state").textContent = `${call.tool} …`));
    if (at !== begun) {
      $("state").textContent = "";
      return;
    }
    state = found.state;
    for (const line of found.text.split("\n")) $("lines").append(el("p", line));
    drawProfile(found.profile);
    $("text").value = "";
    $("state").textContent = `${Math.round(found.milliseconds)} ms`;
  } catch (error) {
    $("state").textContent = error instanceof Error ? error.message : "There is no answer.";
  } finally {
    button.disabled = false;
    $("text").focus();
  }
});

$("clear").addEventListener("click", () => {
  // The whole state: what was said and shown is of the user too. An answer that is under way belongs to it.
  state = null;
  begun += 1;
  $("lines").replaceChildren();
  drawProfile([]);
});

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key-text").value;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // It is kept until the page is left.
  }
  $("key").hidden = true;
});
