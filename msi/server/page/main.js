// The page: events in, panels out; what happened to workers while it was open.
import { Ask } from "./ask.js";
import { at, element } from "./draw.js";
import { Heat } from "./heat.js";
import { Panels } from "./panels.js";
import { Pingpong } from "./pingpong.js";
import { follow, hasKey, useKey } from "./stream.js";

const MAX_LOGGED = 50;
const panels = new Panels(), pingpong = new Pingpong(), heat = new Heat(), ask = new Ask();
let known = null; // workers by id, as they were last
let wasReady = null;

const shown = {
  hello(hello) {
    at("trouble").hidden = true;
    at("key").hidden = true;
    at("model").textContent = `${hello.model}, context ${hello.max_model_len}, version ${hello.version}`;
    document.title = `${hello.model} – MegaScale-Infer`;
    ask.greet(hello);
  },
  numbers(numbers) {
    say(numbers.is_ready ? "good" : "bad", numbers.sentence);
    if (wasReady !== null && wasReady !== numbers.is_ready) {
      log(numbers.is_ready ? "requests are taken again" : `no requests are taken: ${numbers.sentence}`, !numbers.is_ready);
    }
    wasReady = numbers.is_ready;
    compare(numbers.workers);
    panels.show(numbers);
  },
  pingpong: (picture) => pingpong.show(picture),
  experts: (rows) => heat.show(rows),
};

function say(state, sentence) {
  at("status").className = `status ${state}`;
  at("sentence").textContent = sentence;
}

function compare(workers) {
  const now = new Map(workers.map((one) => [one.worker_id, one]));
  for (const [id, one] of known ? now : []) {
    const was = known.get(id);
    const isNew = !was || was.incarnation !== one.incarnation;
    if (one.state === "lost" && (!was || was.state !== "lost")) log(`${id} is lost: ${one.reason}`, true);
    else if (one.state !== "lost" && isNew) log(`${id} began life ${one.incarnation} (pid ${one.pid})`);
    else if (was && one.state !== was.state && one.state !== "lost") log(`${id} is ${one.state}`);
  }
  if (workers.length) known = now;
}

function log(sentence, isBad = false) {
  const item = element("li", isBad ? "bad" : ""), time = element("time", "", new Date().toLocaleTimeString("en-GB"));
  item.append(time, sentence);
  const list = at("log");
  list.querySelector(".quiet")?.remove();
  list.prepend(item);
  while (list.children.length > MAX_LOGGED) list.lastChild.remove();
}

function askForKey() {
  at("key-why").textContent = hasKey() ? "That key is none of this server's." : "This server needs an API key.";
  at("key").hidden = false;
  say("bad", "waiting for a key");
  at("key-value").focus();
  return new Promise((resolve) => {
    at("key").addEventListener("submit", (event) => {
      event.preventDefault();
      useKey(at("key-value").value.trim());
      at("key-value").value = "";
      resolve();
    }, { once: true });
  });
}

follow({
  event: (kind, value) => shown[kind]?.(value),
  lost(sentence) {
    at("trouble").textContent = `No news: ${sentence}. Trying again; what stands below is what was heard last.`;
    at("trouble").hidden = false;
    say("bad", "not connected");
  },
  key: askForKey,
});
