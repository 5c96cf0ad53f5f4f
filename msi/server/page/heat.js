// The heat map of the experts: what each computed lately, by layer. Old rows fade with every event.
import { at, colour, digits, element, sharp, whenChanged } from "./draw.js";
import { bar, fill } from "./panels.js";

const FADE = 0.85; // of what was, with each event: half of it after four
const MAX_HELD = 16, LABELS = 30, HIGHEST = 220;

export class Heat {
  constructor() {
    this.canvas = at("heat");
    this.rows = [];
    this.held = new Map();
    this.canvas.addEventListener("mousemove", (event) => this.point(event));
    this.canvas.addEventListener("mouseleave", () => (at("heat-tip").hidden = true));
    whenChanged(this.canvas, () => this.draw());
    this.draw();
  }

  show(event) {
    const isSame = this.rows.length === event.rows.length && this.rows[0]?.length === event.rows[0]?.length;
    this.rows = event.rows.map((row, layer) => row.map((count, expert) => count + (isSame ? FADE * this.rows[layer][expert] : 0)));
    for (const [id, rows] of this.held) this.held.set(id, FADE * rows);
    for (const { worker_id: id, rows } of event.workers) this.held.set(id, rows + (this.held.get(id) || 0));
    for (const [id, rows] of this.held) if (rows < 1) this.held.delete(id);
    this.draw();
  }

  draw() {
    const numLayers = this.rows.length, numExperts = this.rows[0]?.length || 0;
    this.cell = Math.max(2, Math.min(20, HIGHEST / Math.max(1, numLayers)));
    const { context, width } = sharp(this.canvas, numLayers ? numLayers * this.cell + 16 : 20);
    context.font = `11px ${getComputedStyle(document.body).fontFamily}`;
    context.textBaseline = "middle";
    fill(at("held"), this.bars(), "");
    if (!numLayers) {
      context.fillStyle = colour("quiet");
      context.fillText("No rows since this page was opened.", 0, 10);
      return;
    }
    const left = LABELS, step = (width - left) / numExperts, gap = step > 6 ? 1 : 0, most = Math.max(...this.rows.flat(), 1e-9);
    this.at = { left, step };
    const every = Math.ceil(14 / this.cell);
    this.rows.forEach((row, layer) => {
      context.globalAlpha = 1;
      context.fillStyle = colour("quiet");
      context.textAlign = "left";
      if (layer % every === 0) context.fillText(`L${layer}`, 0, (layer + 0.5) * this.cell);
      row.forEach((count, expert) => {
        const x = left + expert * step, y = layer * this.cell;
        context.globalAlpha = 1;
        context.fillStyle = colour("idle");
        context.fillRect(x, y, step - gap, this.cell - (this.cell > 6 ? 1 : 0));
        context.globalAlpha = count / most;
        context.fillStyle = colour("heat");
        context.fillRect(x, y, step - gap, this.cell - (this.cell > 6 ? 1 : 0));
      });
    });
    context.globalAlpha = 1;
    context.fillStyle = colour("quiet");
    context.textAlign = "center";
    const apart = Math.max(1, Math.ceil(26 / step));
    for (let expert = 0; expert < numExperts; expert += apart) {
      context.fillText(expert, left + (expert + 0.5) * step, numLayers * this.cell + 9);
    }
    this.say(numExperts);
  }

  say(numExperts) {
    let worst = { share: 0 };
    this.rows.forEach((row, layer) => {
      const sum = row.reduce((a, b) => a + b, 0);
      row.forEach((count, expert) => {
        if (sum && (count * numExperts) / sum > worst.share) worst = { share: (count * numExperts) / sum, layer, expert };
      });
    });
    const text = worst.share ? `busiest: expert ${worst.expert} of layer ${worst.layer}, ${digits(worst.share)} times the mean` : "";
    at("heat-note").textContent = text;
    this.canvas.setAttribute("aria-label", `${this.rows.length} layers of ${numExperts} experts; ${text}`);
  }

  bars() {
    const most = Math.max(...this.held.values(), 1e-9), all = [...this.held.values()].reduce((a, b) => a + b, 0);
    return [...this.held].slice(0, MAX_HELD).flatMap(([id, rows]) => [
      element("span", "name", id),
      bar([[rows / most, ""]]),
      element("span", "value", all ? `${Math.round((100 * rows) / all)} % of rows` : ""),
    ]);
  }

  point(event) {
    const tip = at("heat-tip"), box = this.canvas.getBoundingClientRect();
    if (!this.at) return;
    const layer = Math.floor((event.clientY - box.top) / this.cell);
    const expert = Math.floor((event.clientX - box.left - this.at.left) / this.at.step);
    const count = this.rows[layer]?.[expert];
    tip.hidden = count === undefined;
    if (tip.hidden) return;
    const sum = this.rows[layer].reduce((a, b) => a + b, 0);
    tip.textContent = `layer ${layer}, expert ${expert}: ${Math.round((100 * count) / (sum || 1))} % of the layer's rows`;
    tip.style.top = `${(layer + 1) * this.cell + 3}px`;
    tip.style.left = `${Math.max(0, Math.min(event.clientX - box.left, box.width - tip.offsetWidth))}px`;
  }
}
