// The conversation on the page: asks, shows the answer as it comes, stops, repeats, goes on.

import { chatChunks } from "./api.js";
import { newAnswer, parts, takeChunk } from "./conversation.js";
import { AnswerView, QuestionView } from "./message_view.js";

export class Chat {
  /**
   * `elements`: {list, empty}; `model()`: the model's name; `onRunning(isRunning)`; `follower` keeps the end in view;
   * `keepFocus()` takes the focus that an element had which is gone.
   */
  constructor({ elements, conversation, settings, announcer, follower, model, onRunning, keepFocus }) {
    Object.assign(this, { elements, conversation, settings, announcer, follower, model, onRunning, keepFocus });
    this.views = [];
    this.running = null; // the AbortController of the answer that comes
    this.rebuild();
  }

  get isRunning() {
    return this.running !== null;
  }

  send(text) {
    this.conversation.add({ role: "user", content: text });
    this.addView();
    return this.answer();
  }

  stop() {
    this.running?.abort();
  }

  clear() {
    this.stop();
    this.conversation.clear();
    this.conversation.saveNow();
    this.rebuild();
  }

  rebuild() {
    this.views = [];
    this.elements.list.replaceChildren();
    for (const _ of this.conversation.messages) this.addView();
    this.showEmpty();
  }

  showEmpty() {
    this.elements.empty.hidden = this.conversation.messages.length > 0;
  }

  /** Make the view of the message that has none yet. */
  addView(options) {
    const index = this.views.length;
    const message = this.conversation.messages[index];
    const announce = (text) => this.announcer.say(text);
    const actions = {
      announce,
      edit: (text) => {
        this.cut(index);
        this.send(text);
      },
      regenerate: () => {
        this.cut(index);
        this.answer();
      },
      sendResults: () => {
        this.cut(index + 1);
        this.answer();
      },
    };
    const View = message.role === "user" ? QuestionView : AnswerView;
    const view = new View(message, actions, options);
    this.views.push(view);
    this.elements.list.append(view.element);
    this.showEmpty();
    return view;
  }

  cut(index) {
    this.stop();
    this.conversation.cut(index);
    for (const view of this.views.splice(index)) view.element.remove();
    this.showEmpty();
    this.keepFocus();
  }

  async answer() {
    const model = this.model();
    const system = this.settings.system;
    const sent = this.conversation.forServer(system);
    const message = this.conversation.add(newAnswer(model));
    const view = this.addView({ isRunning: true, showTokens: this.settings.wantsTokens });
    const controller = new AbortController();
    this.running = controller;
    this.onRunning(true);
    this.follower.toEnd();
    const show = this.eachFrame(view, message);
    const began = performance.now();
    const seconds = () => (performance.now() - began) / 1000;
    this.announcer.begin();
    try {
      const body = { model, messages: sent, ...this.settings.fields() };
      const options = { stream: true, stream_options: { include_usage: true } };
      for await (const chunk of chatChunks({ ...body, ...options }, controller.signal)) {
        takeChunk(message, chunk);
        keepTimes(message, seconds());
        show();
        this.conversation.save();
      }
    } catch (error) {
      if (error.name === "AbortError") message.stopped = true;
      else message.error = error.message;
    }
    message.seconds = seconds();
    if (this.running === controller) {
      this.running = null;
      this.onRunning(false);
    }
    show.cancel();
    view.end(false);
    this.announcer.end(parts(message).answer, message);
    this.conversation.saveNow();
    this.follower.follow();
  }

  /** A function that shows the message with the next frame, however often it is called until then. */
  eachFrame(view, message) {
    let frame = null;
    const show = () => {
      frame ??= requestAnimationFrame(() => {
        frame = null;
        view.update();
        this.announcer.grow(parts(message).answer);
        this.follower.follow();
      });
    };
    show.cancel = () => cancelAnimationFrame(frame);
    return show;
  }
}

function keepTimes(message, seconds) {
  const { reasoning, isOpen } = parts(message);
  const hasBegun = message.content || reasoning || message.calls.length;
  if (hasBegun) message.firstToken ??= seconds;
  if (reasoning && !isOpen) message.reasoningSeconds ??= seconds - message.firstToken;
}

/** Keeps the end of what scrolls in view, until the reader scrolls up. */
export class Follower {
  constructor(scroller, content, button) {
    this.scroller = scroller;
    this.button = button;
    this.isFollowing = true;
    this.last = 0;
    scroller.addEventListener("scroll", () => this.scrolled(), { passive: true });
    button.addEventListener("click", () => this.toEnd());
    new ResizeObserver(() => this.follow()).observe(content);
  }

  get distance() {
    return this.scroller.scrollHeight - this.scroller.clientHeight - this.scroller.scrollTop;
  }

  scrolled() {
    const { scrollTop } = this.scroller;
    // Following only ever goes down: whoever went up did so by hand.
    if (scrollTop < this.last - 1 && this.distance > 4) this.isFollowing = false;
    else if (this.distance < 24) this.isFollowing = true;
    this.last = scrollTop;
    this.button.hidden = this.isFollowing || this.distance < 80;
  }

  follow() {
    if (this.isFollowing) this.scroller.scrollTop = this.scroller.scrollHeight;
    else this.scrolled();
  }

  toEnd() {
    this.isFollowing = true;
    this.follow();
    this.button.hidden = true;
  }
}

const ANNOUNCE_MS = 4000;

/** Reads an answer out by whole sentences, a few seconds apart, and not by tokens. */
export class Announcer {
  constructor(region) {
    this.region = region;
    this.begin();
  }

  say(text) {
    this.region.textContent = text;
  }

  begin() {
    this.read = 0;
    this.lastTime = performance.now();
  }

  grow(text) {
    if (performance.now() - this.lastTime < ANNOUNCE_MS) return;
    const rest = text.slice(this.read);
    const ends = [...rest.matchAll(/[.!?:;](?=\s)|\n/g)];
    if (!ends.length) return;
    const piece = rest.slice(0, ends.at(-1).index + 1);
    this.read += piece.length;
    this.lastTime = performance.now();
    this.say(spoken(piece));
  }

  end(text, message) {
    const rest = spoken(text.slice(this.read));
    const calls = message.calls.map((call) => `The model calls the tool ${call.name}.`).join(" ");
    if (message.error) return; // an alert reads itself
    this.say([rest, calls, message.stopped ? "Stopped." : ""].filter(Boolean).join(" ") || "The answer is empty.");
  }
}

function spoken(markdown) {
  return markdown.replace(/[*_`#>|~]+/g, " ").replace(/\s+/g, " ").trim();
}
