// The panel that shows the engine at work.

import { CellMap, Sparkline, StackedColumns } from "./charts.js";
import { h } from "./dom.js";

const NUM_STEPS = 100;
const PAGE_STATES = [
  ["own", "in use"],
  ["shared", "shared"],
  ["cached", "cached"],
];
const STEP_PARTS = [
  ["decode", "decode", "decode_tokens"],
  ["prefill", "prefill", "prefill_tokens"],
  ["draft", "draft", "draft_tokens"],
  ["padding", "padding", "padding"],
];

export class EngineView {
  /** `onChoose(engine)`: another replica is to be shown. */
  constructor(root, { onChoose }) {
    this.engines = h("select", {
      "aria-label": "Replica", on: { change: () => onChoose(Number(this.engines.value)) }, hidden: true,
    });
    this.compile = new Compiling();
    this.tiles = {
      running: new Tile("Running"),
      waiting: new Tile("Waiting"),
      generation: new Tile("Generated", { unit: "tokens/s", line: true }),
      prompt: new Tile("Prompts", { unit: "tokens/s", line: true }),
      prefixHits: new Tile("Prefix hits", { hint: "of prompt tokens" }),
      padding: new Tile("Padding", { hint: "of the latest steps" }),
      accepted: new Tile("Drafts kept", { hint: "of drafted tokens" }),
    };
    this.map = new CellMap(PAGE_STATES.map(([name]) => name));
    this.mapLegend = new Legend([...PAGE_STATES, ["free", "free"]]);
    this.mapHint = h("p", { class: "hint" });
    this.host = new Meter("Host memory");
    this.steps = new StackedColumns(STEP_PARTS.map(([name]) => name), NUM_STEPS);
    this.stepsLegend = new Legend(STEP_PARTS);
    this.stepsHint = h("p", { class: "hint" });
    this.requests = new Requests();
    this.figures = h("div", {},
      h("div", { class: "tiles" }, Object.values(this.tiles).map((tile) => tile.element)),
      section("KV pages", this.mapLegend.element, this.map.element, this.mapHint, this.host.element),
      section("Steps", this.stepsLegend.element, this.steps.element, this.stepsHint),
      section("Requests", this.requests.element),
    );
    this.note = h("p", { class: "hint" });
    this.version = h("p", { class: "hint version" });
    root.append(this.engines, this.compile.element, this.note, this.figures, this.version);
    this.figures.hidden = true;
  }

  show({ state, rates, problem }) {
    this.note.textContent = problem ? problem.message : state.view ? "" : (state.reason ?? "The engine is busy.");
    this.note.hidden = !this.note.textContent;
    this.compile.show(state);
    this.showEngines(state?.engines ?? 1);
    this.figures.hidden = !state?.view && (Boolean(problem) || state?.status !== "ready");
    if (!state?.view) return;
    const { requests, pages, host_pages: hostPages, steps } = state.view;
    this.showTiles(requests, rates, steps);
    this.showPages(pages);
    this.host.show(hostPages.in_use, hostPages.total, "pages");
    this.showSteps(steps);
    this.requests.show(requests);
    this.version.textContent = `jax-engine ${state.version} · up ${duration(Math.max(0, Date.now() / 1000 - state.created))} · ${number(state.view.totals.steps)} steps`;
  }

  /** There is nothing to choose from one engine. */
  showEngines(count) {
    if (this.engines.length === count) return;
    this.engines.replaceChildren(...Array.from({ length: count }, (_, engine) => h("option", { value: `${engine}` }, `Engine ${engine}`)));
    this.engines.hidden = count < 2;
  }

  showTiles(requests, rates, steps) {
    const { tiles } = this;
    tiles.running.show(number(requests.running), `of ${number(requests.max_running)} at once`);
    tiles.waiting.show(number(requests.waiting), requests.waiting ? "in the queue" : "nobody");
    tiles.generation.showLine(rates.generation);
    tiles.prompt.showLine(rates.prompt);
    tiles.prefixHits.show(percent(rates.prefixHits));
    const rows = sum(steps, (step) => step.padding + tokensOf(step));
    tiles.padding.show(percent(rows ? sum(steps, (step) => step.padding) / rows : null));
    tiles.accepted.show(percent(rates.accepted));
    tiles.accepted.element.hidden = rates.accepted === null;
  }

  showPages({ total, in_use: inUse, cached, cells, pages_per_cell: perCell, is_sampled: isSampled, page_size: size }) {
    const inCells = (state) => sum(cells, (counts) => counts[state]);
    const looked = sum(cells, (counts) => counts[0] + counts[1]) || 1;
    const shared = Math.round((inUse * inCells(1)) / looked);
    const counts = [inUse - shared, shared, cached, total - inUse - cached];
    this.mapLegend.show(counts.map(number));
    this.map.show(cells, `${inUse} of ${total} KV pages in use, ${shared} of them shared; ${cached} of the others cached`);
    const each = perCell === 1 ? "a cell is a page" : `a cell is ${number(perCell)} pages${isSampled ? ", of which some are looked at" : ""}`;
    this.mapHint.textContent = `${number(total)} pages of ${size} tokens; ${each}.`;
  }

  showSteps(steps) {
    const rows = steps.map((step) => STEP_PARTS.map(([, , field]) => step[field]));
    const top = Math.max(1, ...rows.map((row) => sum(row, (value) => value)));
    const means = STEP_PARTS.map(([, , field]) => (steps.length ? sum(steps, (step) => step[field]) / steps.length : 0));
    const shown = means.map((mean) => mean.toFixed(mean < 10 ? 1 : 0));
    this.stepsLegend.show(shown, STEP_PARTS.map(([name], index) => name === "draft" && !means[index]));
    const described = STEP_PARTS.map(([, label], index) => `${shown[index]} ${label}`).join(", ");
    this.steps.show(rows, top, `The latest ${steps.length} steps; token rows a step on average: ${described}`);
    const seconds = steps.length ? sum(steps, (step) => step.seconds) / steps.length : 0;
    this.stepsHint.textContent = steps.length
      ? `Token rows of the latest ${steps.length} steps, ${number(top)} at most; ${(seconds * 1000).toFixed(1)} ms a step.`
      : "No step yet.";
  }
}

/** How far the step programs are, while some are still to come. */
export class Compiling {
  constructor() {
    this.bar = h("progress", { max: 1, "aria-label": "Step programs compiled" });
    this.text = h("p", { class: "hint" });
    this.element = h("div", { class: "compiling" }, this.bar, this.text);
    this.show(undefined);
  }

  show(state) {
    const { programs_compiled: done, programs_planned: planned, compile_eta_seconds: eta } = state ?? {};
    this.element.hidden = !planned || done >= planned || (state.status === "ready" && !eta);
    if (this.element.hidden) return;
    this.bar.value = done / planned;
    const left = eta ? `, about ${duration(eta)} left` : "";
    this.text.textContent = `${done} of ${planned} step programs compiled${left}.`;
  }
}

class Tile {
  constructor(label, { unit = null, hint = "", line = false } = {}) {
    this.value = h("span", { class: "value" }, "–");
    this.hint = h("span", { class: "hint" }, hint);
    this.line = line ? new Sparkline() : null;
    this.label = label;
    this.element = h("div", { class: "tile" },
      h("span", { class: "label" }, label),
      h("span", {}, this.value, unit ? h("span", { class: "unit" }, ` ${unit}`) : null),
      this.line ? this.line.element : this.hint,
    );
  }

  show(value, hint) {
    this.value.textContent = value;
    if (hint !== undefined) this.hint.textContent = hint;
  }

  showLine(values) {
    const last = values.at(-1) ?? 0;
    this.show(number(Math.round(last)));
    this.line.show(values, `${this.label}: ${Math.round(last)} tokens a second; at most ${Math.round(Math.max(0, ...values))} of late`);
  }
}

class Legend {
  constructor(series) {
    this.values = series.map(() => h("strong", {}, "–"));
    this.element = h("ul", { class: "legend" },
      series.map(([name, label], index) => h("li", {}, h("span", { class: `swatch ${name}` }), `${label} `, this.values[index])),
    );
  }

  /** `hidden`: those that do not occur here. */
  show(values, hidden = []) {
    values.forEach((value, index) => (this.values[index].textContent = value));
    this.values.forEach((value, index) => (value.parentElement.hidden = hidden[index] ?? false));
  }
}

class Meter {
  constructor(label) {
    this.label = label;
    this.bar = h("progress", { class: "host", max: 1, "aria-label": `${label} in use` });
    this.text = h("span", { class: "hint" });
    this.element = h("div", { class: "meter" }, h("span", { class: "label" }, label), this.bar, this.text);
  }

  show(value, total, unit) {
    this.element.hidden = !total;
    this.bar.value = total ? value / total : 0;
    this.text.textContent = `${number(value)} of ${number(total)} ${unit}`;
  }
}

/** Who runs and who waits: the first of them. */
class Requests {
  constructor() {
    this.body = h("tbody");
    const columns = ["Request", "At", "Tokens", "Pages", "Age"];
    this.table = h("table", {}, h("thead", {}, h("tr", {}, columns.map((name) => h("th", { scope: "col" }, name)))), this.body);
    this.more = h("p", { class: "hint" });
    this.element = h("div", { class: "requests" }, this.table, this.more);
  }

  show({ running, waiting, first_running: first, first_waiting: queue }) {
    this.table.hidden = !first.length && !queue.length;
    this.body.replaceChildren(...first.map((one) => row(one, at(one))), ...queue.map((one) => row(one, "waits")));
    const left = running + waiting - first.length - queue.length;
    this.more.textContent = this.table.hidden ? "No request is in flight." : left > 0 ? `and ${number(left)} more` : "";
  }
}

function at({ num_prompt: prompt, num_computed: computed }) {
  return computed < prompt ? `prefill ${Math.floor((100 * computed) / prompt)} %` : "decode";
}

function row(one, state) {
  const name = one.request_id.slice(0, 8);
  return h("tr", { class: state === "waits" ? "waits" : null },
    h("td", { title: one.request_id }, h("code", {}, name), one.adapter ? h("span", { class: "hint" }, ` ${one.adapter}`) : null),
    h("td", {}, state),
    h("td", {}, `${number(one.num_prompt)} + ${number(one.num_output)}`),
    h("td", {}, number(one.num_pages)),
    h("td", {}, duration(one.seconds)),
  );
}

function section(title, ...children) {
  return h("section", { class: "figure-section" }, h("h3", {}, title), ...children);
}

const sum = (items, value) => items.reduce((total, item) => total + value(item), 0);
const tokensOf = (step) => step.prefill_tokens + step.decode_tokens + step.draft_tokens;
const FORMAT = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const COMPACT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export function number(value) {
  return value < 100_000 ? FORMAT.format(value) : COMPACT.format(value);
}

function percent(share) {
  return share === null ? "–" : `${(100 * share).toFixed(share < 0.1 && share > 0 ? 1 : 0)} %`;
}

export function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return seconds < 172_800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86_400)} days`;
}
