// An answer token by token: each tinted by how unlikely it was, and under pointer or focus, what else was likely there.

import { h } from "./dom.js";

let shown = null; // one detail at a time, as one is pointed at

/** The element for a list of OpenAI's log-probability entries, which may grow: call `update` then. */
export class TokenView {
  constructor(tokens) {
    this.tokens = tokens;
    this.detail = h("div", { class: "token-detail", role: "tooltip", id: `tokens-${Math.random().toString(36).slice(2)}` });
    this.detail.hidden = true;
    this.text = h("div", {
      class: "tokens",
      role: "toolbar", // one stop of the Tab key, within which arrow keys move
      "aria-label": "Tokens of the answer; arrow keys move between them",
      on: {
        pointerover: (event) => this.show(event.target.closest(".token")),
        pointerleave: () => this.hide(),
        focusin: (event) => this.show(event.target.closest(".token")),
        focusout: () => this.hide(),
        keydown: (event) => this.move(event),
      },
    });
    this.element = h("div", { class: "token-view" }, this.text, this.detail);
    this.update();
  }

  update() {
    for (let index = this.text.childElementCount; index < this.tokens.length; index++) {
      const { token, logprob } = this.tokens[index];
      const probability = Math.exp(logprob);
      const element = h("span", {
        class: "token",
        role: "button",
        tabindex: index === 0 ? "0" : "-1",
        "aria-label": `${visible(token)}, ${percent(probability)}`,
        "aria-describedby": this.detail.id,
        "data-index": index,
      });
      element.style.setProperty("--surprise", (1 - probability).toFixed(3));
      element.append(token.trim() ? token : token.replaceAll("\n", "⏎\n") || "∅");
      this.text.append(element);
    }
  }

  show(element) {
    if (!element) return;
    shown?.hide();
    shown = this;
    const { token, logprob, top_logprobs: top = [] } = this.tokens[element.dataset.index];
    const likely = top.some((other) => other.token === token) ? top : [...top, { token, logprob }];
    const rows = likely.map((other) => alternative(other, other.token === token));
    this.detail.replaceChildren(h("table", {}, h("caption", {}, "Likeliest here"), h("tbody", {}, rows)));
    this.detail.hidden = false;
    this.place(element);
  }

  hide() {
    this.detail.hidden = true;
    if (shown === this) shown = null;
  }

  /** Below the token, or above where there is no room; always within the view's width. */
  place(element) {
    const view = this.element.getBoundingClientRect();
    const token = element.getClientRects()[0] ?? element.getBoundingClientRect();
    const left = Math.max(0, Math.min(token.left - view.left, view.width - this.detail.offsetWidth));
    const below = token.bottom + this.detail.offsetHeight + 8 < window.innerHeight - 120;
    const top = below ? token.bottom - view.top + 6 : token.top - view.top - this.detail.offsetHeight - 6;
    this.detail.style.left = `${left}px`;
    this.detail.style.top = `${top}px`;
  }

  move(event) {
    const tokens = [...this.text.children];
    const from = tokens.indexOf(event.target.closest(".token"));
    const to = { ArrowRight: from + 1, ArrowDown: from + 1, ArrowLeft: from - 1, ArrowUp: from - 1 }[event.key];
    const last = tokens.length - 1;
    if (event.key === "Escape" && !this.detail.hidden) {
      this.hide();
      event.stopPropagation();
      return;
    }
    const target = event.key === "Home" ? 0 : event.key === "End" ? last : to;
    if (target === undefined || target < 0 || target > last) return;
    event.preventDefault();
    tokens[from].tabIndex = -1;
    tokens[target].tabIndex = 0;
    tokens[target].focus();
  }
}

function alternative({ token, logprob }, isChosen) {
  const probability = Math.exp(logprob);
  const bar = h("span", { class: "bar" });
  bar.style.setProperty("--share", probability.toFixed(4));
  return h(
    "tr",
    { class: isChosen ? "chosen" : null },
    h("th", { scope: "row" }, visible(token), isChosen ? h("span", { class: "visually-hidden" }, " (chosen)") : null),
    h("td", {}, bar),
    h("td", { class: "figure" }, percent(probability)),
  );
}

/** Blanks made visible; a token of half a character has no text of its own. */
function visible(token) {
  return token.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
}

function percent(probability) {
  if (probability > 0.9995) return "100 %";
  return probability < 0.001 ? "< 0.1 %" : `${(probability * 100).toFixed(1)} %`;
}
