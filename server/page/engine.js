// Watches the engine: asks the server how it is, once a second while somebody looks, and keeps what rates need.

import { getJson } from "./api.js";

const PERIOD_MS = 1000;
const HIDDEN_PERIOD_MS = 4000; // while only the line at the top shows it
const HISTORY = 120; // looks that are kept
const RECENT_SECONDS = 60;

export class EngineWatch {
  /** `isDetailed()`: whether the panel is open; `onLook(look)`: each answer, or {problem} where there is none. */
  constructor({ isDetailed, onLook }) {
    this.isDetailed = isDetailed;
    this.onLook = onLook;
    this.engine = 0; // of several replicas
    this.history = [];
    this.timer = null;
    this.looking = false;
    document.addEventListener("visibilitychange", () => this.now());
  }

  /** Look at another replica from now on. */
  choose(engine) {
    this.engine = engine;
    this.history = [];
    this.now();
  }

  /** Look at once, and again from then on; nobody sees a hidden page. */
  async now() {
    clearTimeout(this.timer);
    if (document.hidden || this.looking) return;
    this.looking = true;
    try {
      const { engine } = this;
      const state = await getJson(`engine_state?engine=${engine}`);
      if (engine !== this.engine) return; // another was chosen meanwhile
      if (state.view) this.remember(state.view);
      this.onLook({ state, rates: this.rates() });
    } catch (error) {
      this.onLook({ problem: error });
    } finally {
      this.looking = false;
      this.timer = setTimeout(() => this.now(), this.isDetailed() ? PERIOD_MS : HIDDEN_PERIOD_MS);
    }
  }

  remember({ time, totals }) {
    const last = this.history.at(-1);
    if (last && totals.steps < last.totals.steps) this.history = []; // another engine
    if (last && time <= last.time) return; // the same look, shared with others
    this.history.push({ time, totals });
    if (this.history.length > HISTORY + 1) this.history.shift();
  }

  /** Tokens a second, look by look, and shares over the last minute; null where nothing was counted. */
  rates() {
    const perSecond = (name) =>
      this.history.slice(1).map(({ time, totals }, index) => {
        const before = this.history[index];
        return (totals[name] - before.totals[name]) / (time - before.time);
      });
    return {
      generation: perSecond("generation_tokens"),
      prompt: perSecond("prompt_tokens"),
      prefixHits: this.share("prefix_cache_hits", "prefix_cache_queries"),
      accepted: this.share("spec_accepted_tokens", "spec_draft_tokens"),
    };
  }

  share(part, whole) {
    const last = this.history.at(-1);
    if (!last) return null;
    const first = this.history.find(({ time }) => time > last.time - RECENT_SECONDS) ?? last;
    const recent = last.totals[whole] - first.totals[whole];
    if (recent > 0) return (last.totals[part] - first.totals[part]) / recent;
    return last.totals[whole] ? last.totals[part] / last.totals[whole] : null;
  }
}
