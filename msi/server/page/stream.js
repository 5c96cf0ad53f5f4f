// The event stream, as long as the page is seen: it comes again after every end, and asks for a key where one is needed.

const KEY = "msi-api-key";
const FIRST_WAIT_MS = 500, LONGEST_WAIT_MS = 5000, SILENT_AFTER_MS = 6000, HIDDEN_AFTER_MS = 60000;

export function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

// Calls `on.event(kind, value)`, `on.lost(sentence)` and, where a key is missing or wrong, awaits `on.key()`.
export async function follow(on) {
  let wait = FIRST_WAIT_MS;
  for (;;) {
    let sentence = "the server ended the stream";
    await seen();
    const sentinel = new AbortController(), stopWatching = whenHidden(() => sentinel.abort());
    try {
      const response = await fetch("/v1/events", { headers: headers(), signal: sentinel.signal, cache: "no-store" });
      if (response.status === 401) {
        await on.key();
        continue;
      }
      if (response.ok) {
        await read(response.body, sentinel, (kind, value) => {
          wait = FIRST_WAIT_MS;
          on.event(kind, value);
        });
      } else {
        sentence = await sentenceOf(response);
      }
    } catch (error) {
      sentence = error.name === "AbortError" ? "the server has said nothing for a while" : "the server does not answer";
    } finally {
      stopWatching();
    }
    if (document.hidden) continue;
    on.lost(sentence);
    await new Promise((resolve) => setTimeout(resolve, wait));
    wait = Math.min(2 * wait, LONGEST_WAIT_MS);
  }
}

async function seen() {
  while (document.hidden) await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
}

// Calls `leave` once the tab has been hidden for a while: workers need not tell what nobody sees. Returns how to stop.
function whenHidden(leave) {
  let timer = 0;
  const look = () => {
    clearTimeout(timer);
    if (document.hidden) timer = setTimeout(leave, HIDDEN_AFTER_MS);
  };
  document.addEventListener("visibilitychange", look);
  return () => {
    clearTimeout(timer);
    document.removeEventListener("visibilitychange", look);
  };
}

async function read(body, sentinel, tell) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const timer = setTimeout(() => sentinel.abort(), SILENT_AFTER_MS);
    let part;
    try {
      part = await reader.read();
    } finally {
      clearTimeout(timer);
    }
    if (part.done) return;
    const events = (rest + part.value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const kind = /^event: (.*)$/m.exec(event), data = /^data: (.*)$/m.exec(event);
      if (kind && data) tell(kind[1], JSON.parse(data[1]));
    }
  }
}

// What an answer says of why it is none.
export async function sentenceOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}
