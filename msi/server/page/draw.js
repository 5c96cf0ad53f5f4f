// What all pictures share: sharp canvases, the colours of the style sheet, numbers as people read them.

export function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

export const at = (id) => document.getElementById(id);

export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// A context in CSS pixels, cleared.
export function sharp(canvas, height) {
  const width = canvas.clientWidth, ratio = window.devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return { context, width, height };
}

// Calls `draw` when there is another size or another scheme of colours.
export function whenChanged(canvas, draw) {
  let width = 0;
  new ResizeObserver(() => {
    if (canvas.clientWidth !== width) {
      width = canvas.clientWidth;
      draw();
    }
  }).observe(canvas.parentElement);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

export function duration(seconds) {
  if (!seconds) return "–";
  if (seconds < 0.001) return `${digits(seconds * 1e6)} µs`;
  if (seconds < 1) return `${digits(seconds * 1e3)} ms`;
  return `${digits(seconds)} s`;
}

export function digits(value) {
  if (!value) return "0";
  if (value >= 100) return Math.round(value).toString();
  return value.toFixed(value >= 10 ? 1 : 2);
}

export const percent = (share) => `${Math.round(100 * share)} %`;

export function bytes(count) {
  return count >= 2 ** 30 ? `${digits(count / 2 ** 30)} GiB` : `${Math.round(count / 2 ** 20)} MiB`;
}
