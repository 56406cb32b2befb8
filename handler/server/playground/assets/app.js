// What a tab knows of the rest.

import { ApiError, connect } from "./api.js";
import { ask, element, field } from "./dom.js";

export { ApiError };
const ROOT = new URL("..", import.meta.url).href; // beside which this page's files lie, below whatever prefix
const KEY = "kindling-key";

export function create(open) {
  const listeners = new Map();
  let model = null;
  const on = (name, listener) => listeners.set(name, [...(listeners.get(name) || []), listener]);
  const emit = (name, detail) => (listeners.get(name) || []).forEach(listener => listener(detail));
  const keys = keeper(() => { model = null; emit("key"); });
  const api = connect(ROOT, keys);
  const say = text => { document.getElementById("live").textContent = text; };
  async function learn() {
    const { data: [first], loras } = await api.get("v1/models");
    return { ...await api.get(`v1/models/${first.id}`), loras };
  }

  return {
    root: ROOT, api, on, emit, say, open,
    key: keys.get,
    changeKey: () => keys.ask(keys.get()),
    model: () => (model ||= learn().catch(error => { model = null; throw error; })),
    status: () => api.get("v1/status"),
    load: async parameters => { await open("make"); emit("load", parameters); },
    edit: async (blob, name) => { await open("make"); emit("edit", { blob, name }); },
    fail: (error, container) => fail(error, container, say),
    clear, check,
  };
}

/** Where the key is: in this tab alone, and nowhere if the browser keeps nothing. */
function keeper(changed) {
  let key = null, asking = null, left = 0;
  try { key = sessionStorage.getItem(KEY); } catch { /* storage is denied */ }
  const set = given => {
    key = given || null;
    try { key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY); } catch {}
    changed();
  };
  return {
    get: () => key,
    /** A key; null if none was given since `tried` was sent `at` a time. */
    ask(tried, at) {
      if (at && tried !== key) return Promise.resolve(key);
      if (at <= left) return Promise.resolve(null);
      return (asking ||= dialog(tried, !at).then(given => { given === null ? left = Date.now() : set(given); return given; })
        .finally(() => { asking = null; }));
    },
  };
}

async function dialog(tried, wanted) {
  const input = element("input", { type: "password", name: "key", autocomplete: "off", value: (wanted && tried) || "" });
  const why = wanted ? "It is kept for this tab alone, and sent to this worker only. Leave it empty to forget it."
    : tried ? "The worker did not take that key. Try another."
      : "This worker answers only those who have one of its keys. Yours is kept for this tab alone.";
  return await ask("API key", field("Key", input, why), "Use this key") ? input.value.trim() : null;
}

let errors = 0;

/** Show an error beside the field that it names, or else at the container's top, and go there. */
function fail(error, container, say) {
  if (error.name === "AbortError") return;
  if (!(error instanceof ApiError)) console.error(error);
  clear(container);
  const named = error.param && container.querySelector(`[name="${CSS.escape(error.param)}"]`);
  const text = element("p", { class: "error", id: `error-${++errors}` }, error.message);
  if (named && !named.closest("[hidden]")) {
    for (let box = named.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
    named.setAttribute("aria-invalid", "true");
    named.setAttribute("aria-errormessage", text.id);
    (named.closest(".field") || named.parentElement).append(text);
    named.focus();
    if (document.activeElement === named) return say(error.message);
  } else {
    container.prepend(text);
  }
  text.tabIndex = -1;
  text.focus();
  say(error.message);
}

function clear(container) {
  container.querySelectorAll("[id^=error-]").forEach(each => each.remove());
  container.querySelectorAll("[aria-invalid]").forEach(each => {
    each.removeAttribute("aria-invalid");
    each.removeAttribute("aria-errormessage");
  });
}

/** Refuse what is no number, which browsers give as nothing. */
function check(container) {
  const bad = [...container.querySelectorAll("[type=number]")].find(each => each.validity.badInput);
  if (bad) throw new ApiError("This should be a number.", { param: bad.name });
}
