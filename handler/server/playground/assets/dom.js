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

export const button = (text, onclick, more) => element("button", { type: "button", onclick, ...more }, text);

/** A control with its label, and a sentence that says what it does. */
export function field(label, control, hint = "", beside = []) {
  const id = (control.id ||= `field-${control.name}`);
  const said = element("span", { class: "hint", id: `${id}-hint` }, hint);
  control.setAttribute("aria-describedby", said.id);
  const line = beside.length ? element("div", { class: "row tight" }, control, beside) : control;
  return element("div", { class: "field" }, element("label", { for: id }, label), line, said);
}

/** A dialog over the page. The promise has whether it was confirmed. */
export function ask(title, body, confirm, cancel = "Cancel") {
  return new Promise(resolve => {
    const buttons = element("div", { class: "row end" },
      button(cancel, () => box.close()),
      confirm && element("button", { class: "primary", value: "yes" }, confirm));
    const name = element("h2", { id: "asked" }, title);
    const box = element("dialog", { class: "card", "aria-labelledby": "asked" },
      element("form", { method: "dialog" }, name, body, buttons));
    box.addEventListener("close", () => { box.remove(); resolve(box.returnValue === "yes"); });
    document.body.append(box);
    box.showModal();
  });
}
