// The ping-pong: a row per worker, a bar per span, a colour per lane; what is empty is a bubble.
import { at, colour, duration, element, percent, sharp, whenChanged } from "./draw.js";

const ROW = 26, GAP = 9, TOP = 4, AXIS = 18, LANES = 4, MIN_LABEL = 11;
const SAMPLE = "sample";

export class Pingpong {
  constructor() {
    this.canvas = at("pingpong");
    this.tip = at("tip");
    this.passes = 2;
    this.isHeld = false;
    this.picture = null;
    this.bars = [];
    for (const button of document.querySelectorAll("[data-passes]")) {
      button.addEventListener("click", () => {
        this.passes = Number(button.dataset.passes);
        for (const other of document.querySelectorAll("[data-passes]")) other.setAttribute("aria-pressed", other === button);
        this.draw();
      });
    }
    at("hold").addEventListener("click", () => {
      this.isHeld = !this.isHeld;
      at("hold").setAttribute("aria-pressed", this.isHeld);
    });
    this.canvas.addEventListener("mousemove", (event) => this.point(event));
    this.canvas.addEventListener("mouseleave", () => (this.tip.hidden = true));
    whenChanged(this.canvas, () => this.draw());
    this.draw();
  }

  show(picture) {
    if (this.isHeld) return;
    if (isIdle(picture) && this.picture && !isIdle(this.picture)) {
      at("pingpong-note").textContent = "idle; this is the last that was computed";
      return;
    }
    this.picture = picture;
    this.draw();
  }

  draw() {
    const rows = this.picture ? this.picture.rows : [];
    const isEmpty = !this.picture || isIdle(this.picture);
    const { context, width } = sharp(this.canvas, isEmpty ? 2 * ROW : TOP + rows.length * (ROW + GAP) + AXIS);
    this.bars = [];
    context.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    context.textBaseline = "middle";
    if (isEmpty) {
      context.fillStyle = colour("quiet");
      context.fillText("Nothing has been computed since this page was opened: ask the model something.", 0, ROW);
      return;
    }
    const isNarrow = width < 560;
    const labels = rows.map((row) => (isNarrow ? short(row.worker_id) : row.worker_id));
    const left = 12 + Math.max(...labels.map((label) => context.measureText(label).width));
    const right = isNarrow ? 44 : 138;
    const [begin, end] = this.window();
    const x = (us) => left + ((us - begin) / (end - begin)) * (width - left - right);
    const layers = numbered(this.picture);
    context.save();
    context.beginPath();
    context.rect(left, 0, width - left - right, this.canvas.clientHeight);
    context.clip();
    rows.forEach((row, index) => this.row(context, row, TOP + index * (ROW + GAP), x, begin, end, layers));
    this.journeys(context, x, begin, end);
    context.restore();
    rows.forEach((row, index) => {
      const y = TOP + index * (ROW + GAP) + ROW / 2;
      context.fillStyle = colour("ink");
      context.textAlign = "left";
      context.fillText(labels[index], 0, y);
      const busy = busyIn(row, begin, end);
      context.fillText(isNarrow ? percent(busy) : `busy ${percent(busy)}`, width - right + 8, y);
      if (!isNarrow) {
        context.fillStyle = colour("quiet");
        context.textAlign = "right";
        context.fillText(`idle ${percent(1 - busy)}`, width, y);
      }
    });
    this.axis(context, x, begin, end, left, width - right);
    this.say(begin, end);
  }

  // What is shown of the window, in microseconds: whole passes of one lane, where it has some.
  window() {
    const { rows, until_us: until, names } = this.picture;
    if (!this.passes) return [0, Math.max(1, until)];
    const row = rows.find((one) => one.role === "attention" && one.bars.length) || rows[0];
    const ends = row.bars.filter((bar) => names[bar[0]] === SAMPLE && bar[1] === 0).map((bar) => bar[2] + bar[3]);
    const inside = ends.filter((one) => one >= 0 && one < until);
    if (inside.length < 2) return [0, Math.max(1, until)];
    return [inside[0], inside[Math.min(this.passes, inside.length - 1)]];
  }

  row(context, row, y, x, begin, end, layers) {
    const { names } = this.picture;
    context.fillStyle = colour("idle");
    context.fillRect(x(begin), y, x(end) - x(begin), ROW);
    context.textAlign = "center";
    for (const bar of row.bars) {
      const [name, lane, start, length] = bar;
      if (start > end || start + length < begin) continue;
      const from = x(start), to = Math.max(x(start + length), from + 0.75);
      const isPale = names[name] !== "attention" && names[name] !== "experts";
      context.fillStyle = colour(`${isPale ? "pale" : "lane"}-${lane % LANES}`);
      context.fillRect(from, y, to - from, ROW);
      this.bars.push({ from, to, y, text: `${row.worker_id}: ${names[name]}, lane ${lane}, ${duration(length / 1e6)}` });
      const layer = layers.get(bar);
      if (layer && !isPale && to - from > MIN_LABEL + 4 * String(layer).length) {
        context.fillStyle = colour("on-lane");
        context.fillText(layer, (from + to) / 2, y + ROW / 2 + 0.5);
      }
    }
    const lanes = [...new Set(row.away.map((bar) => bar[1]))].sort((a, b) => a - b);
    if (!this.isPair()) {
      for (const [, lane, start, length] of row.away) {
        if (start > end || start + length < begin) continue;
        context.fillStyle = colour(`lane-${lane % LANES}`);
        context.fillRect(x(start), y + ROW + 1.5 + 2.5 * (lanes.indexOf(lane) % 3), Math.max(0.75, x(start + length) - x(start)), 1.5);
      }
    }
  }

  isPair() {
    return this.picture.rows.length === 2 && this.picture.rows[0].worker_id !== this.picture.rows[1].worker_id;
  }

  // Of one attention and one expert worker: what a lane did here, and what followed from it there.
  journeys(context, x, begin, end) {
    if (!this.isPair()) return;
    context.lineWidth = 1;
    const steps = new Map();
    this.picture.rows.forEach((row, index) => {
      for (const bar of row.bars) {
        if (!steps.has(bar[1])) steps.set(bar[1], []);
        steps.get(bar[1]).push({ index, start: bar[2], end: bar[2] + bar[3] });
      }
    });
    for (const [lane, own] of steps) {
      own.sort((one, two) => one.start - two.start);
      context.strokeStyle = colour(`lane-${lane % LANES}`);
      context.beginPath();
      for (let number = 1; number < own.length; number++) {
        const one = own[number - 1], two = own[number];
        if (one.index === two.index || two.start < begin || one.end > end) continue;
        const edge = (step, side) => TOP + step.index * (ROW + GAP) + (side > step.index ? ROW : 0);
        context.moveTo(x(one.end), edge(one, two.index));
        context.lineTo(x(two.start), edge(two, one.index));
      }
      context.stroke();
    }
  }

  axis(context, x, begin, end, left, right) {
    const span = (end - begin) / 1e3, wanted = Math.max(2, (right - left) / 90);
    const power = 10 ** Math.floor(Math.log10(span / wanted));
    const step = [1, 2, 5, 10].map((one) => one * power).find((one) => span / one <= wanted);
    const y = TOP + this.picture.rows.length * (ROW + GAP) + 5;
    context.fillStyle = colour("quiet");
    context.textAlign = "center";
    for (let ms = 0; ms <= span * 1.0001; ms += step) {
      const text = `${Number(ms.toPrecision(6))}${ms === 0 ? " ms" : ""}`;
      context.fillText(text, Math.max(left + context.measureText(text).width / 2, x(begin + ms * 1e3)), y);
    }
  }

  say(begin, end) {
    const { rows, num_left_out: left } = this.picture;
    const mean = (role) => {
      const of = rows.filter((row) => row.role === role).map((row) => busyIn(row, begin, end));
      return of.length ? percent(of.reduce((a, b) => a + b, 0) / of.length) : "none";
    };
    const sides = `attention busy ${mean("attention")}, experts ${mean("expert")}`;
    at("pingpong-note").textContent = left ? `${sides}; ${left} more workers are not shown` : sides;
    this.canvas.setAttribute("aria-label", `${duration((end - begin) / 1e6)} of ${rows.length} rows: ${sides}`);
    const lanes = [...new Set(rows.flatMap((row) => row.bars.map((bar) => bar[1])))].sort((a, b) => a - b);
    const items = lanes.map((lane) => [`lane-${lane % LANES}`, `lane ${lane}`]);
    items.push(["pale", "sampling, shared experts"], ["idle", "bubble"]);
    at("legend").replaceChildren(
      ...items.map(([name, text]) => {
        const item = element("span", "", text);
        item.prepend(element("i", name));
        return item;
      }),
    );
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    const bar = this.bars.find((one) => x >= one.from - 1 && x <= one.to + 1 && y >= one.y && y <= one.y + ROW);
    this.tip.hidden = !bar;
    if (!bar) return;
    this.tip.textContent = bar.text;
    this.tip.style.top = `${bar.y + ROW + 3}px`;
    this.tip.style.left = `${Math.max(0, Math.min(x, box.width - this.tip.offsetWidth))}px`;
  }
}

const isIdle = (picture) => !picture.rows.some((row) => row.bars.length);

function short(workerId) {
  return workerId.replace("attention-", "att ").replace("expert-", "exp ");
}

function busyIn(row, begin, end) {
  const inside = row.bars.map(([, , start, length]) => Math.max(0, Math.min(end, start + length) - Math.max(begin, start)));
  return Math.min(1, inside.reduce((a, b) => a + b, 0) / Math.max(1, end - begin));
}

// Layers by bar: counted for each lane from one sampling to the next. Experts count with the only attention worker.
function numbered(picture) {
  const layers = new Map(), { rows, names } = picture;
  const attention = rows.filter((row) => row.role === "attention"), isOnly = attention.length === 1;
  for (const row of attention) {
    const own = [...row.bars, ...(isOnly ? rows.filter((one) => one !== row).flatMap((one) => one.bars.map((bar) => bar)) : [])];
    const owner = new Map(rows.flatMap((one) => one.bars.map((bar) => [bar, one])));
    const counts = new Map();
    own.sort((one, two) => one[2] - two[2]);
    for (const bar of own) {
      const lane = bar[1], key = owner.get(bar);
      if (names[bar[0]] === SAMPLE) counts.set(lane, new Map());
      else if (counts.has(lane) && ["attention", "experts"].includes(names[bar[0]])) {
        const of = counts.get(lane);
        of.set(key, (of.get(key) || 0) + 1);
        layers.set(bar, of.get(key));
      }
    }
  }
  return layers;
}
