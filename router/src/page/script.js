// The page at `/`: live figures from `/status`, and a chat over `/v1/chat/completions`.
// Addresses are relative, so that a proxy may put the server under a path of its own.
"use strict";

const $ = (id) => document.getElementById(id);

// === live figures ===

const POLL_MS = 1000;
// Rates are means over this long: steps come in bursts, and numbers that jump cannot be read.
const WINDOW_MS = 3000;
const POINTS_MAX = 60;

const WORDS = {
  ready: "ready",
  loading: "loading the model",
  draining: "stopping",
  down: "down",
  unreachable: "unreachable",
};

const samples = [];
const lines = { decode: [], prefill: [] };
let state = "";
let keyWanted = false;

const whole = (number) => Math.round(number).toLocaleString("en");
const short = (rate) => (rate > 0 && rate < 10 ? rate.toFixed(1) : whole(rate));

async function poll() {
  try {
    const patience = AbortSignal.timeout(5 * POLL_MS);
    const answer = await fetch("status", { cache: "no-store", signal: patience });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    show(await answer.json());
  } catch {
    told("unreachable");
  }
  // A page that nobody looks at asks less often; browsers stretch its timers anyway.
  setTimeout(poll, document.hidden ? 10 * POLL_MS : POLL_MS);
}

function told(now) {
  $("live").classList.toggle("stale", now !== "ready");
  if (now === state) return;
  state = now;
  $("state").dataset.state = now;
  $("state").textContent = WORDS[now] ?? now;
  document.title = now === "ready" ? "Headrace" : `Headrace: ${WORDS[now] ?? now}`;
  if (now === "unreachable") samples.length = 0;
  else describe();
}

function show(status) {
  keyWanted = status.api_key;
  told(status.state);
  if (keyWanted && !key()) askForKey();
  $("running").textContent = whole(status.running);
  $("waiting").textContent = whole(status.waiting);
  showCache(status);
  $("requests").textContent = whole(status.requests);
  $("requests-note").textContent = status.failed ? `${whole(status.failed)} failed or left` : "none failed";
  showRates(status);
}

function showCache(status) {
  const share = (blocks) => (status.kv_blocks ? (100 * blocks) / status.kv_blocks : 0);
  const percent = (blocks) => `${Math.ceil(share(blocks))} %`;
  $("kv").textContent = percent(status.kv_blocks_used);
  $("kv-note").textContent = `${percent(status.kv_blocks_cached)} cached`;
  $("kv-used").style.width = `${share(status.kv_blocks_used)}%`;
  $("kv-cached").style.width = `${share(status.kv_blocks_cached)}%`;
}

function showRates(status) {
  const now = performance.now();
  const last = samples.at(-1);
  // Another process behind the same address counts from zero.
  if (last && status.generated_tokens < last.decode) samples.length = 0;
  samples.push({ at: now, decode: status.generated_tokens, prefill: status.prefill_tokens });
  while (samples.length > 2 && now - samples[1].at >= WINDOW_MS) samples.shift();
  const first = samples[0];
  const seconds = (now - first.at) / 1000;
  for (const name of ["decode", "prefill"]) {
    const rate = seconds > 0 ? (samples.at(-1)[name] - first[name]) / seconds : 0;
    $(name).textContent = short(rate);
    const line = lines[name];
    line.push(rate);
    if (line.length > POINTS_MAX) line.shift();
    // From the right, and never a mountain out of a single token.
    const top = Math.max(1, ...line);
    const x = (index) => 60 - (60 * (line.length - 1 - index)) / (POINTS_MAX - 1);
    const points = line.map((value, index) => `${x(index).toFixed(1)},${(19 - (18 * value) / top).toFixed(1)}`);
    $(`${name}-line`).setAttribute("points", points.join(" "));
  }
}

async function describe() {
  const info = await fetch("info").then((answer) => answer.json()).catch(() => null);
  if (!info) return;
  const name = document.createElement("b");
  name.textContent = info.model_id;
  const parts = [info.model_dtype, info.model_device_type && `on ${info.model_device_type}`];
  const known = parts.filter(Boolean).join(" ");
  $("model").replaceChildren(name, known && ` ${known}`);
  const context = info.max_total_tokens;
  if (context) $("max-tokens").max = context;
  if (context && Number($("max-tokens").value) >= context) $("max-tokens").value = Math.ceil(context / 2);
  const limits = [
    context && `${whole(context)} tokens a conversation`,
    `${whole(info.max_concurrent_requests)} requests at once`,
  ];
  $("running-note").textContent = info.max_batch_size ? `of ${whole(info.max_batch_size)} at most` : "sequences";
  $("about").textContent = [...limits, `version ${info.version}`].filter(Boolean).join(" · ");
  const body = { model: info.model_id, messages: [{ role: "user", content: "Why is the sky blue?" }], stream: true };
  const auth = keyWanted ? ' \\\n    -H "Authorization: Bearer $API_KEY"' : "";
  const url = new URL("v1/chat/completions", document.baseURI);
  $("curl").textContent =
    `curl -N ${url}${auth} \\\n    -H 'Content-Type: application/json' \\\n    -d '${JSON.stringify(body)}'`;
}

// === the API key ===

const KEY = "headrace-api-key";
const key = () => sessionStorage.getItem(KEY);

function askForKey(refused = false) {
  $("key-form").hidden = false;
  if (!refused) return;
  sessionStorage.removeItem(KEY);
  $("key").focus();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value);
  $("key").value = "";
  $("key-form").hidden = true;
  $("prompt").focus();
});

// === the chat ===

const welcome = $("welcome");
let messages = [];
let running = null;

/** Why an answer did not come: a status (0 if there was none) and a sentence. */
class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function turn(role) {
  welcome.remove();
  const box = document.createElement("article");
  box.className = `turn ${role}`;
  const who = document.createElement("span");
  who.className = "who";
  who.textContent = role === "user" ? "You" : "Model";
  const text = document.createElement("div");
  text.className = "text";
  const note = document.createElement("small");
  note.className = "note";
  box.append(who, text, note);
  $("chat").append(box);
  return { box, text, note };
}

function complain(error) {
  const box = document.createElement("p");
  box.className = "error";
  box.setAttribute("role", "alert");
  const number = document.createElement("b");
  number.textContent = error.status || "No answer";
  box.append(number, ` ${error.message}`);
  $("chat").append(box);
  follow(true);
}

/** Scrolls to the end, unless whoever reads has scrolled away from it. */
function follow(always) {
  const page = document.scrollingElement;
  const below = page.scrollHeight - page.scrollTop - page.clientHeight;
  if (always || below < 160) page.scrollTop = page.scrollHeight;
}

function wanted() {
  const number = (id) => ($(id).value.trim() === "" ? undefined : Number($(id).value));
  const system = $("system").value.trim();
  return {
    model: "tgi",
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    max_tokens: number("max-tokens"),
    temperature: number("temperature"),
    top_p: number("top-p"),
    seed: number("seed"),
    stream: true,
    stream_options: { include_usage: true },
  };
}

async function refusal(answer) {
  const text = await answer.text();
  let message = text;
  try {
    const { error } = JSON.parse(text);
    message = error?.message ?? error ?? text;
  } catch {
    // Plain text, or nothing.
  }
  if (answer.status === 401) message = "The API key is missing or wrong.";
  return new Refusal(answer.status, message || answer.statusText);
}

/** The payloads of a stream of events, as they come. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data:")) yield part.slice(5).trim();
  }
}

/** Streams one answer; calls `say` with each piece. Returns what is known of the whole. */
async function ask(say, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key()) headers.Authorization = `Bearer ${key()}`;
  const answer = await fetch("v1/chat/completions", {
    method: "POST", headers, signal, body: JSON.stringify(wanted()),
  });
  if (!answer.ok) throw await refusal(answer);
  const found = {};
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") return found;
    const { error, choices, usage } = JSON.parse(data);
    if (error) throw new Refusal(error.http_status_code ?? 0, error.message);
    if (usage) found.usage = usage;
    const choice = choices[0];
    if (choice?.delta?.content) say(choice.delta.content);
    if (choice?.finish_reason) found.reason = choice.finish_reason;
  }
  throw new Refusal(0, "The connection ended before the answer did.");
}

function busy(on) {
  $("chat").setAttribute("aria-busy", on);
  $("send").disabled = on;
  $("stop").disabled = !on;
}

async function send(prompt) {
  const chat = messages;
  chat.push({ role: "user", content: prompt });
  turn("user").text.textContent = prompt;
  const { box, text, note } = turn("assistant");
  follow(true);
  running = new AbortController();
  busy(true);
  const started = performance.now();
  let first = 0;
  let pieces = "";
  let drawn = 0;
  let asked = false;
  // The page is drawn once a frame, however fast the tokens come.
  const draw = () => {
    asked = false;
    text.append(pieces.slice(drawn));
    drawn = pieces.length;
    follow(false);
  };
  const say = (piece) => {
    first ||= performance.now();
    pieces += piece;
    if (!asked) requestAnimationFrame(draw);
    asked = true;
  };
  try {
    const { usage, reason } = await ask(say, running.signal);
    note.textContent = summary(usage, reason, first && first - started, performance.now() - first);
  } catch (error) {
    if (error.name === "AbortError") note.textContent = "stopped";
    else failed(error, pieces ? "" : prompt);
  }
  draw();
  // A question without an answer is no part of what the model is asked next.
  if (pieces) chat.push({ role: "assistant", content: pieces });
  else chat.pop();
  if (!text.textContent && !note.textContent) box.remove();
  running = null;
  busy(false);
}

/** Says what went wrong, and puts the question back where it was typed. */
function failed(error, prompt) {
  complain(error instanceof Refusal ? error : new Refusal(0, `The server cannot be reached (${error.message}).`));
  if (error.status === 401) askForKey(true);
  if (!$("prompt").value) $("prompt").value = prompt;
}

function summary(usage, reason, wait, rest) {
  const parts = [];
  if (usage) parts.push(`${whole(usage.prompt_tokens)} tokens in, ${whole(usage.completion_tokens)} out`);
  if (wait > 0) parts.push(`first after ${whole(wait)} ms`);
  if (wait > 0 && usage?.completion_tokens > 1) parts.push(`then ${short((1000 * (usage.completion_tokens - 1)) / rest)} tokens/s`);
  if (reason === "length") parts.push("cut at the limit of new tokens");
  return parts.join(" · ");
}

function submit() {
  const prompt = $("prompt").value.trim();
  if (!prompt || running) return;
  $("prompt").value = "";
  send(prompt);
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});

$("prompt").addEventListener("keydown", (event) => {
  // While a word is being composed, Enter ends the word.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});

$("stop").addEventListener("click", () => running?.abort());

$("clear").addEventListener("click", () => {
  running?.abort();
  messages = [];
  $("chat").replaceChildren(welcome);
  $("prompt").focus();
});

$("examples").addEventListener("click", (event) => {
  if (event.target.tagName === "BUTTON" && !running) send(event.target.textContent);
});

$("copy").addEventListener("click", async () => {
  getSelection().selectAllChildren($("curl"));
  // Browsers lend the clipboard to pages over HTTPS and of this machine; elsewhere it is marked.
  await navigator.clipboard?.writeText($("curl").textContent);
  $("copy").textContent = navigator.clipboard ? "Copied" : "Marked";
});

poll();
