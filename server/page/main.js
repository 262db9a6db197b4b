// Ties the parts of the page together: keys, panels, models, the chat and the view of the engine.

import { ServerError, getJson } from "./api.js";
import { Announcer, Chat, Follower } from "./chat.js";
import { Conversation } from "./conversation.js";
import { h } from "./dom.js";
import { EngineWatch } from "./engine.js";
import { Compiling, EngineView, number } from "./engine_view.js";
import { isSend } from "./message_view.js";
import { Panels } from "./panels.js";
import { Settings } from "./settings.js";

const SUGGESTIONS = ["What is 17 + 25?", "Tell me a short story.", "What is the capital of France?", "Who are you?"];
const KEY_MODEL = "jax-engine-model";
const find = (id) => document.getElementById(id);

const settings = new Settings(find("settings-form"));
const conversation = new Conversation();
const announcer = new Announcer(find("announcer"));
const prompt = find("prompt");
const chat = new Chat({
  elements: { list: find("messages"), empty: find("empty") },
  conversation,
  settings,
  announcer,
  follower: new Follower(find("scroller"), find("column"), find("to-end")),
  model: () => find("model").value || undefined,
  onRunning: showRunning,
  keepFocus: () => document.activeElement === document.body && focusPrompt(),
});
const panels = new Panels(find("chat"));
const engineView = new EngineView(find("engine-view"), { onChoose: (engine) => watch.choose(engine) });
const compiling = new Compiling();
const watch = new EngineWatch({ isDetailed: () => panels.isOpen("engine"), onLook: showEngine });
let wasReady = null;

/** Not where that brings up a keyboard over half of the page. */
function focusPrompt() {
  if (!matchMedia("(pointer: coarse)").matches) prompt.focus();
}

function showRunning(isRunning) {
  const [gone, shown] = isRunning ? [find("send"), find("stop")] : [find("stop"), find("send")];
  const hadFocus = document.activeElement === gone;
  gone.hidden = true;
  shown.hidden = false;
  if (hadFocus) focusPrompt();
}

function send() {
  const text = prompt.value.trim();
  if (!text || chat.isRunning) return;
  prompt.value = "";
  fitPrompt();
  chat.send(text);
}

find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("keydown", (event) => {
  if (!isSend(event)) return;
  event.preventDefault();
  send();
});
/** As high as its text, in browsers that do not do that themselves. */
function fitPrompt() {
  if (CSS.supports("field-sizing", "content")) return;
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}
prompt.addEventListener("input", fitPrompt);
find("stop").addEventListener("click", () => chat.stop());
find("clear").addEventListener("click", () => {
  chat.clear();
  announcer.say("The conversation is cleared.");
  focusPrompt();
});
find("theme").addEventListener("click", () => announcer.say(`${window.toggleTheme()} colours`));
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.defaultPrevented) return;
  if (chat.isRunning) chat.stop();
  else panels.closeOverlay();
});
addEventListener("pagehide", () => conversation.flush());
function suggest(text) {
  chat.send(text);
  focusPrompt();
}
find("suggestions").append(
  ...SUGGESTIONS.map((text) => h("button", { type: "button", on: { click: () => suggest(text) } }, text)),
);

/** The line at the top, the notice over the message box, and the panel, by what was just seen of the engine. */
function showEngine(look) {
  const { state, problem, rates } = look;
  const isReady = state?.status === "ready";
  if (isReady && !wasReady) loadModels();
  if (isReady && wasReady === false) announcer.say("The engine is ready.");
  wasReady = isReady;
  find("status").dataset.state = problem ? "problem" : isReady ? "ready" : state.status === "starting" ? "starting" : "problem";
  find("status-text").textContent = problem ? shortProblem(problem) : statusText(state, rates);
  compiling.show(isReady ? undefined : state);
  find("notice-text").textContent = problem?.status === 401 ? "This server asks for an API key." : (problem?.message ?? state.reason ?? "");
  find("enter-key").hidden = problem?.status !== 401;
  find("notice").hidden = isReady;
  if (panels.isOpen("engine")) engineView.show(look);
}

function shortProblem(problem) {
  return problem.status === 401 ? "API key needed" : "Not reachable";
}

function statusText(state, rates) {
  if (state.status !== "ready") return { starting: "Starting", dead: "Stopped" }[state.status] ?? "Shutting down";
  if (state.view?.is_sleeping) return "Asleep";
  const running = state.view?.requests.running;
  if (!running) return "Ready";
  return `${number(running)} running · ${number(Math.round(rates.generation.at(-1) ?? 0))} tokens/s`;
}

/** Fill in the models that the server has; adapters say so. */
async function loadModels() {
  const select = find("model");
  let data;
  try {
    ({ data } = await getJson("v1/models"));
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    return; // the next look at the engine tells why
  }
  const wanted = select.value || localStorage.getItem(KEY_MODEL);
  select.replaceChildren(
    ...data.map(({ id, parent }) => h("option", { value: id }, parent ? `${id} (adapter of ${parent})` : id)),
  );
  if (data.some(({ id }) => id === wanted)) select.value = wanted;
}
find("model").addEventListener("change", () => localStorage.setItem(KEY_MODEL, find("model").value));

// Adapters come and go meanwhile.
document.addEventListener("visibilitychange", () => !document.hidden && wasReady && loadModels());
find("notice").append(compiling.element);
find("enter-key").addEventListener("click", () => {
  panels.toggle("settings", true);
  find("api-key").focus();
});
find("api-key").addEventListener("change", () => watch.now());
panels.listeners.push((name, isOpen) => name === "engine" && isOpen && watch.now());
watch.now();
focusPrompt();
