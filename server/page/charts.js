// Small pictures of figures. One path for each series, so that showing new figures is a handful of attributes.

import { svg } from "./dom.js";

/** A drawing with a path for each of `series` (its class), and a name that says what it shows. */
class Chart {
  constructor(className, series, { stretch = true } = {}) {
    this.paths = series.map((name) => svg("path", { class: name }));
    this.element = svg("svg", { class: className, role: "img" }, ...this.paths);
    if (stretch) this.element.setAttribute("preserveAspectRatio", "none");
  }

  show(width, height, shapes, label) {
    this.element.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.element.setAttribute("aria-label", label);
    this.paths.forEach((path, index) => path.setAttribute("d", shapes[index].join("")));
  }
}

const box = (x, y, width, height) => `M${x} ${round(y)}h${width}v${round(height)}h${-width}z`;
const round = (number) => Math.round(number * 100) / 100;

const COLUMNS = 32;
const CELL = 10;
const GAP = 1.6;

/** A grid of cells, each filled from below by the shares of its states; the last state is left empty. */
export class CellMap {
  constructor(series) {
    this.chart = new Chart("cell-map", [...series, "free"], { stretch: false });
    this.element = this.chart.element;
    this.count = series.length;
  }

  show(cells, label) {
    const shapes = Array.from({ length: this.count + 1 }, () => []);
    const side = CELL - GAP;
    cells.forEach((counts, index) => {
      const x = (index % COLUMNS) * CELL;
      const top = Math.floor(index / COLUMNS) * CELL;
      const total = counts.reduce((sum, count) => sum + count, 0) || 1;
      let bottom = top + side;
      counts.forEach((count, state) => {
        if (!count) return;
        const height = (side * count) / total;
        bottom -= height;
        shapes[state].push(box(x, bottom, side, height));
      });
    });
    this.chart.show(COLUMNS * CELL - GAP, Math.ceil(cells.length / COLUMNS) * CELL - GAP, shapes, label);
  }
}

/** Columns of stacked values, the latest at the right. */
export class StackedColumns {
  constructor(series, count) {
    this.chart = new Chart("columns", series);
    this.element = this.chart.element;
    this.count = count;
  }

  show(rows, top, label) {
    const shapes = this.chart.paths.map(() => []);
    const first = this.count - rows.length;
    rows.forEach((values, index) => {
      let y = 100;
      values.forEach((value, series) => {
        if (!value) return;
        const height = (100 * value) / top;
        y -= height;
        shapes[series].push(box((first + index) * 10, y, 8, height));
      });
    });
    this.chart.show(this.count * 10 - 2, 100, shapes, label);
  }
}

const LEAST_POINTS = 30;

/** A line over an area, the latest value at the right. */
export class Sparkline {
  constructor() {
    this.chart = new Chart("sparkline", ["area", "line"]);
    this.element = this.chart.element;
  }

  show(values, label) {
    const top = Math.max(...values, 1e-9) * 1.1;
    const count = Math.max(values.length, LEAST_POINTS);
    const first = count - values.length;
    const points = values.map((value, index) => `${first + index} ${round(30 - (28 * value) / top)}`);
    const line = points.length > 1 ? `M${points.join("L")}` : "";
    const area = line ? `${line}L${count - 1} 30L${first} 30z` : "";
    this.chart.show(count - 1, 30, [[area], [line]], label);
  }
}
