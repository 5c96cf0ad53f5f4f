// Numbers: tiles, stage times, stragglers, workers and links.
import { at, bytes, colour, digits, duration, element, percent, sharp, whenChanged } from "./draw.js";

const LINE_LENGTH = 120; // of "numbers" events: a minute
const STAGES = [
  ["T_a", "attention_s", "attention", "attention"],
  ["T_e", "expert_s", "expert", "expert"],
  ["T_c", "comm_s", "attention", "comm"],
];
const PARTED = 1.3;
const MAX_PEERS = 12;

export class Panels {
  constructor() {
    this.rates = [];
    this.numbers = null;
    whenChanged(at("rate-line"), () => this.line());
  }

  show(numbers) {
    this.numbers = numbers;
    this.tiles(numbers);
    this.stages(numbers);
    this.peers(numbers.links);
    this.workers(numbers.workers, numbers.num_requests > 0);
    this.links(numbers.links);
  }

  tiles({ load, workers, num_requests: requests }) {
    this.rates.push(load.tokens_per_s);
    this.rates.splice(0, this.rates.length - LINE_LENGTH);
    at("rate").textContent = digits(load.tokens_per_s);
    this.line();
    for (const [id, of] of [["ttft", load.first_token], ["tpot", load.per_token]]) {
      at(id).textContent = duration(of.p50_s);
      at(`${id}-tail`).textContent = of.count ? `p99 ${duration(of.p99_s)}` : "";
    }
    const live = workers.filter((one) => one.state !== "lost");
    const sum = (field) => live.reduce((total, one) => total + one[field], 0);
    at("running").textContent = sum("num_running");
    at("waiting").textContent = `${sum("num_waiting")} waiting, ${requests} requests`;
    const blocks = sum("kv_blocks"), used = blocks ? 1 - sum("kv_blocks_free") / blocks : 0;
    at("kv").textContent = blocks ? `${(100 * used).toFixed(used < 0.1 ? 1 : 0)} %` : "–";
    at("kv-bar").style.width = `${100 * used}%`;
  }

  line() {
    const { context, width, height } = sharp(at("rate-line"), 30);
    const most = Math.max(...this.rates, 1e-9), step = width / (LINE_LENGTH - 1);
    context.strokeStyle = colour("lane-0");
    context.lineWidth = 1.5;
    context.beginPath();
    this.rates.forEach((rate, index) => {
      context.lineTo(width - (this.rates.length - 1 - index) * step, height - 2 - (rate / most) * (height - 5));
    });
    context.stroke();
  }

  stages({ workers, num_lanes: lanes, drift }) {
    at("lanes").textContent = lanes ? `m = ${lanes} micro-batch${lanes > 1 ? "es" : ""} in flight` : "";
    const live = workers.filter((one) => one.state !== "lost"), rows = [], means = {};
    for (const [name, field, role] of STAGES) {
      const told = live.filter((one) => one[field] > 0), own = told.filter((one) => one.role === role);
      const of = own.length ? own : told; // a colocated worker tells T_e, too
      means[name] = of.length ? of.reduce((total, one) => total + one[field], 0) / of.length : 0;
      for (const one of of) rows.push([name, one.worker_id, one[field]]);
    }
    const expected = (name, stage, measured) => (drift && drift[stage] ? measured / drift[stage] : 0);
    const most = Math.max(...rows.map((row) => row[2]), ...STAGES.map(([name, , , stage]) => expected(name, stage, means[name])), 1e-12);
    const made = [];
    for (const [name, , , stage] of STAGES) {
      const ratio = drift && drift[stage], plan = ratio ? `; ${digits(ratio)} of the plan's` : "";
      const own = rows.filter((row) => row[0] === name);
      if (!own.length) continue;
      made.push(element("div", "group", `${name}${own.length > 1 ? ` ${duration(means[name])} in the mean` : ""}${plan}`));
      for (const [, worker, seconds] of own) {
        const track = bar([[seconds / most, ratio && Math.max(ratio, 1 / ratio) > PARTED ? "parted" : ""]]);
        if (ratio) track.append(mark(expected(name, stage, seconds) / most));
        made.push(element("span", "name", worker), track, element("span", "value", duration(seconds)));
      }
    }
    fill(at("stages"), made, "Nothing has been measured yet.");
    at("stage-note").textContent = advice(means, lanes);
  }

  peers(links) {
    const shown = links.filter((link) => link.residence_s || link.delay_s).slice(0, MAX_PEERS);
    const most = Math.max(...shown.map((link) => Math.max(link.delay_p99_s, link.delay_s + link.residence_s)), 1e-12);
    const made = shown.flatMap((link) => {
      const delay = link.delay_s / most, whole = (link.delay_s + link.residence_s) / most;
      const track = bar([[whole, "more"], [link.delay_p99_s / most, "tail"], [delay, ""]]);
      track.title = `delay ${duration(link.delay_s)}, p99 ${duration(link.delay_p99_s)}; there ${duration(link.residence_s)}, p99 ${duration(link.residence_p99_s)}`;
      const value = `${duration(link.delay_s)} + ${duration(link.residence_s)}`;
      return [element("span", "name", `${link.worker_id} → ${link.peer}`), track, element("span", "value", value)];
    });
    if (made.length) made.unshift(element("div", "group", "delay + time there; thin: the delay's 99th percentile"));
    fill(at("peers"), made, "No exchanges yet.");
  }

  workers(workers, hasWork) {
    const body = at("workers").tBodies[0];
    body.replaceChildren(
      ...workers.map((one) => {
        const row = element("tr", one.state === "lost" ? "lost" : ""), isLive = one.state !== "lost";
        const state = one.state === "loading" ? `loading ${percent(one.loaded)}` : isLive ? one.state : `lost: ${one.reason}`;
        const used = one.kv_blocks ? percent(1 - one.kv_blocks_free / one.kv_blocks) : "";
        const sequences = one.role !== "attention" ? "" : `${one.num_running}${one.num_waiting ? ` + ${one.num_waiting}` : ""}`;
        row.append(element("td", "", one.worker_id), element("td", isLive ? "" : "why", state));
        const cells = [percent(one.busy), hasWork ? percent(one.bubble) : "–", sequences, used, bytes(one.rss_bytes)];
        for (const cell of cells) row.append(element("td", "n", isLive ? cell : ""));
        row.append(element("td", "quiet", `${one.pid} on ${one.host}, life ${one.incarnation}`));
        return row;
      }),
    );
  }

  links(links) {
    const sorted = [...links].sort((one, two) => (name(one) < name(two) ? -1 : 1));
    at("links").hidden = !links.length;
    at("links").tBodies[0].replaceChildren(
      ...sorted.map((link) => {
        const row = element("tr");
        row.append(element("td", "", name(link)), element("td", "why", link.way || "–"));
        return row;
      }),
    );
  }
}

const name = (link) => `${link.worker_id} → ${link.peer}`;

// Eq 3 of the paper, by what was measured.
function advice(means, lanes) {
  const forward = Math.max(means.T_a, means.T_e);
  if (!forward || !means.T_e || !means.T_a || !means.T_c) return "";
  const needed = digits(2 * (1 + means.T_c / forward));
  return means.T_c < forward ? `hiding T_c needs m ≥ ${needed}, it is ${lanes}` : "T_c > T_f: communication cannot be hidden";
}

export function bar(parts) {
  const track = element("span", "track");
  for (const [share, className] of parts) {
    const part = element("i", className);
    part.style.width = `${100 * Math.min(1, share)}%`;
    track.append(part);
  }
  return track;
}

function mark(share) {
  const made = element("i", "mark");
  made.style.left = `${100 * Math.min(1, share)}%`;
  made.title = "as planned";
  return made;
}

export function fill(parent, made, empty) {
  parent.replaceChildren(...(made.length ? made : [element("span", "empty", empty)]));
}
