// How one message looks: what the user said, or an answer with its reasoning, tool calls, figures and mistakes.

import { parts } from "./conversation.js";
import { copyButton, h, icon, iconButton } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { TokenView } from "./tokens.js";

let unique = 0;

/** What the user said. `actions`: {announce, edit(text)}. */
export class QuestionView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.element = h("li", { class: "message user" });
    this.show();
  }

  update() {}

  show() {
    const edit = iconButton("edit", "Edit message", () => this.edit());
    this.element.replaceChildren(
      h("h3", { class: "visually-hidden" }, "You"),
      h("div", { class: "bubble" }, this.message.content),
      h("div", { class: "actions" }, edit, copyButton("Copy message", () => this.message.content, this.actions.announce)),
    );
  }

  edit() {
    const id = `edit-${unique++}`;
    const area = h("textarea", { id, class: "editor", rows: Math.min(this.message.content.split("\n").length + 1, 12) });
    area.value = this.message.content;
    const cancel = () => {
      this.show();
      this.element.querySelector("button").focus();
    };
    const save = () => area.value.trim() && this.actions.edit(area.value.trim());
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      } else if (isSend(event)) {
        event.preventDefault();
        save();
      }
    });
    const buttons = [
      h("button", { type: "button", class: "primary", on: { click: save } }, "Send"),
      h("button", { type: "button", on: { click: cancel } }, "Cancel"),
    ];
    this.element.replaceChildren(
      h("label", { for: id, class: "visually-hidden" }, "Edit message"),
      area,
      h("div", { class: "row end" }, ...buttons),
    );
    area.focus();
  }
}

/** Enter sends; not with Shift, and not while a character is being composed. */
export function isSend(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}

/** An answer. `actions`: {announce, regenerate(), sendResults()}. `isRunning` while it grows. */
export class AnswerView {
  constructor(message, actions, { isRunning = false, showTokens = false } = {}) {
    this.message = message;
    this.actions = actions;
    this.isRunning = isRunning;
    this.showTokens = showTokens;
    this.tokenView = null;
    this.shownCalls = null;
    this.prose = h("div", { class: "prose" });
    this.calls = h("div", { class: "calls" });
    this.problem = h("div", { class: "problem", role: "alert" });
    this.figures = h("span", { class: "figures" });
    this.buttons = h("div", { class: "actions" });
    this.reasoningSummary = h("summary");
    this.reasoningText = h("div", { class: "prose" });
    this.reasoning = h("details", { class: "reasoning" }, this.reasoningSummary, this.reasoningText);
    this.reasoning.addEventListener("toggle", () => this.update());
    this.element = h(
      "li",
      { class: "message assistant" },
      h("h3", { class: "visually-hidden" }, message.model ?? "Assistant"),
      this.reasoning,
      this.prose,
      this.calls,
      this.problem,
      h("div", { class: "footer" }, this.buttons, this.figures),
    );
    this.end(isRunning);
  }

  /** Show the message as it is by now. */
  update() {
    const { reasoning, answer, isOpen } = parts(this.message);
    this.reasoning.hidden = !reasoning;
    if (reasoning) {
      const thinks = isOpen && this.isRunning;
      const seconds = this.message.reasoningSeconds;
      const ended = seconds >= 0.1 ? `Thought for ${seconds.toFixed(1)} s` : "Reasoning";
      this.reasoningSummary.textContent = thinks ? "Thinking…" : ended;
      this.reasoning.classList.toggle("open-ended", thinks);
      if (this.reasoning.open) renderMarkdown(this.reasoningText, reasoning, this.actions.announce);
    }
    this.updateAnswer(answer);
    if (this.message.calls.length) this.updateCalls();
    const waits = this.isRunning && !reasoning && !this.message.content && !this.message.calls.length;
    this.element.classList.toggle("waiting", waits);
    this.element.classList.toggle("running", this.isRunning);
  }

  updateAnswer(answer) {
    const asTokens = this.showTokens && this.message.tokens.length > 0;
    if (asTokens && !this.tokenView) {
      this.tokenView = new TokenView(this.message.tokens);
      this.prose.after(this.tokenView.element);
    }
    this.tokenView?.update();
    if (this.tokenView) this.tokenView.element.hidden = !asTokens;
    this.prose.hidden = asTokens || !answer;
    if (!asTokens) renderMarkdown(this.prose, answer, this.actions.announce);
  }

  updateCalls() {
    const state = JSON.stringify([this.message.calls, this.isRunning]);
    if (state === this.shownCalls) return;
    this.shownCalls = state;
    const asks = !this.isRunning && this.message.calls.some((call) => call.result === null);
    const cards = this.message.calls.map((call) => callCard(call, { asks, send: () => this.sendResults() }));
    const label = this.message.calls.length > 1 ? "Send results" : "Send result";
    const button = h("button", { type: "button", class: "primary", on: { click: () => this.sendResults() } }, label);
    this.calls.replaceChildren(...cards, asks ? h("div", { class: "row end" }, button) : "");
  }

  sendResults() {
    const areas = [...this.calls.querySelectorAll("textarea")];
    const empty = areas.find((area) => !area.value.trim());
    if (empty) {
      empty.focus();
      this.actions.announce("Each call needs a result");
      return;
    }
    const open = this.message.calls.filter((call) => call.result === null);
    open.forEach((call, index) => (call.result = areas[index].value));
    this.update();
    this.actions.sendResults();
  }

  /** The answer has ended, or (`isRunning`) begun again. */
  end(isRunning) {
    this.isRunning = isRunning;
    const { message, actions } = this;
    this.problem.hidden = !message.error;
    if (message.error) {
      const retry = iconButton("retry", "Retry", actions.regenerate, { text: "Retry" });
      this.problem.replaceChildren(h("p", {}, message.error), retry);
    } else this.problem.replaceChildren();
    this.buttons.replaceChildren();
    if (!isRunning) this.buttons.append(...this.endButtons());
    this.figures.textContent = isRunning ? "" : figures(message);
    this.update();
  }

  endButtons() {
    const { message, actions } = this;
    // Beside a mistake stands "Retry", which is the same.
    const buttons = message.error ? [] : [iconButton("retry", "Regenerate answer", actions.regenerate)];
    if (message.content) buttons.unshift(copyButton("Copy answer", () => parts(message).answer, actions.announce));
    if (message.tokens.length) {
      const toggle = iconButton("tokens", "Show token probabilities", () => {
        this.showTokens = !this.showTokens;
        toggle.setAttribute("aria-pressed", String(this.showTokens));
        this.update();
      });
      toggle.setAttribute("aria-pressed", String(this.showTokens));
      buttons.push(toggle);
    }
    return buttons;
  }
}

function callCard(call, { asks, send }) {
  const card = h(
    "section",
    { class: "call", "aria-label": `Call of the tool ${call.name}` },
    h("header", {}, icon("wrench"), h("strong", {}, call.name || "…"), h("span", { class: "hint" }, "tool call")),
    h("pre", { tabindex: "0", role: "group", "aria-label": "Arguments" }, h("code", {}, pretty(call.arguments))),
  );
  if (call.result !== null) {
    const result = h("pre", { tabindex: "0", role: "group", "aria-label": "Result" }, h("code", {}, pretty(call.result)));
    card.append(h("div", { class: "hint" }, "Result"), result);
  } else if (asks) {
    const id = `result-${unique++}`;
    const area = h("textarea", { id, rows: 2, placeholder: "What the tool returned, e.g. JSON" });
    area.addEventListener("keydown", (event) => {
      if (!isSend(event)) return;
      event.preventDefault();
      send();
    });
    card.append(h("label", { for: id, class: "hint" }, `Result of ${call.name}`), area);
  }
  return card;
}

/** JSON with line breaks; as it is while it is not complete. */
function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function figures(message) {
  const shown = [];
  if (message.stopped) shown.push("stopped");
  else if (message.finish && message.finish !== "stop") {
    shown.push({ length: "cut off at the token limit", tool_calls: "asks for a tool" }[message.finish] ?? message.finish);
  }
  const tokens = message.usage?.completion_tokens;
  if (tokens) {
    shown.push(`${tokens} tokens`);
    // Of an answer so short that it came in one go, the rate from its first token on tells nothing.
    const since = message.seconds - message.firstToken;
    shown.push(`${Math.round(since > 0.25 ? (tokens - 1) / since : tokens / message.seconds)} tokens/s`);
    const cached = message.usage.prompt_tokens_details?.cached_tokens;
    if (cached) shown.push(`${cached} of ${message.usage.prompt_tokens} prompt tokens cached`);
  }
  if (message.firstToken) shown.push(`first token after ${message.firstToken.toFixed(2)} s`);
  return shown.join(" · ");
}
