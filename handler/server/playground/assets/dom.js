// How elements are made: text only ever as text, so that no prompt can be markup.

const PROPERTIES = ["value", "checked", "disabled", "open"];

/** An element. Of `attributes`, those that begin with "on" are listeners; true and false set one and leave it out.
 * Children are texts, nodes, lists of those, or nothing. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (PROPERTIES.includes(name)) made[name] = value;
    else if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter(child => child != null && child !== false));
  return made;
}

const made = (tag, name) => (...children) => element(tag, { class: name }, ...children);
export const hint = made("p", "hint"), note = made("p", "note"), wrong = made("p", "error"), para = made("p"), aside = made("span", "hint"), row = made("div", "row"), bench = made("div", "bench");
export const pairs = (name, rows) => element("dl", { class: name }, rows.map(([what, said]) => element("div", {}, element("dt", {}, what), element("dd", {}, said))));
export const style = name => element("link", { rel: "stylesheet", href: new URL(name, import.meta.url).href });
export const button = (text, onclick, more) => element("button", { type: "button", onclick, ...more }, text);

export function field(label, control, hint = "", beside = []) {
  const id = (control.id ||= `field-${control.name}`);
  const said = element("span", { class: "hint", id: `${id}-hint` }, hint);
  control.setAttribute("aria-describedby", said.id);
  const line = beside.length ? element("div", { class: "row tight" }, control, beside) : control;
  return element("div", { class: "field" }, element("label", { for: id }, label), line, said);
}

/** A dialog over the page, with a button of this text or this one. The promise has whether it was confirmed. */
export function ask(title, body, confirm, cancel = "Cancel") {
  return new Promise(resolve => {
    const buttons = element("div", { class: "row end" },
      button(cancel, () => box.close()),
      confirm.nodeType ? confirm : element("button", { class: "primary", value: "yes" }, confirm));
    const name = element("h2", { id: "asked" }, title);
    const box = element("dialog", { class: "card", "aria-labelledby": "asked" },
      element("form", { method: "dialog" }, name, body, buttons));
    box.addEventListener("close", () => { box.remove(); resolve(box.returnValue === "yes"); });
    document.body.append(box);
    box.showModal();
  });
}

/** Put a text on the clipboard, or select it where a page may not: browsers let only those of https. */
export async function copy(pre, app) {
  try {
    await navigator.clipboard.writeText(pre.textContent);
    pre.closest("dialog")?.close();
    app.say("Copied.");
  } catch {
    getSelection().selectAllChildren(pre);
    app.say("It is selected. Copy it with your keyboard.");
  }
}
