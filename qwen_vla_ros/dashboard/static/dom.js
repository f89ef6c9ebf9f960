// Small helpers: elements without markup in strings, so that no text from a topic can ever become HTML.

export const $ = (selector, root = document) => root.querySelector(selector);
export const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

/** An element with properties, attributes (data-, aria-, role …) and children. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "on") for (const [event, handler] of Object.entries(value)) element.addEventListener(event, handler);
    else if (key in element && !key.includes("-") && key !== "list") element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** One of the page's symbols; what it means is always written beside it. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** Sets text only where it differs: a screen reader must not hear what did not change. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function mark(element, name, value) {
  if (element.dataset[name] !== value) element.dataset[name] = value;
}

export function pill(element, symbol, level, text) {
  const key = `${symbol}|${level}|${text}`;
  if (element.dataset.key === key) return;
  element.dataset.key = key;
  element.dataset.level = level;
  element.replaceChildren(icon(symbol), text);
}

export function show(element, visible) {
  if (element && element.hidden === visible) element.hidden = !visible;
}

export function seconds(value) {
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 120) return `${Math.round(value)} s`;
  return `${Math.round(value / 60)} min`;
}

export function milliseconds(value) {
  return value >= 10000 ? seconds(value / 1000) : value >= 100 ? `${Math.round(value)} ms` : `${value.toFixed(1)} ms`;
}

export const LEVEL_ICONS = { ok: "ok", warn: "warn", error: "error", stale: "stale" };
export const OUTCOME_ICONS = { success: "ok", partial: "half", failure: "error", aborted: "abort", unfinished: "stale" };
