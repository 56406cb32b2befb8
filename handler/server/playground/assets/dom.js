// How elements are made: text only ever as text, so that no prompt can be markup.

/** An element. `attributes`: "on…" are listeners, true and false set and leave out, "class" and the like as in HTML;
 * properties that HTML has no attribute for (value, checked) are set as such. Children may be texts, nodes, or nothing. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (["value", "checked"].includes(name)) made[name] = value;
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter(child => child != null && child !== false));
  return made;
}

/** A field: its label, the control, and a sentence that says what it does. The control's id is made of its name. */
export function field(label, control, hint = "") {
  const id = (control.id ||= `f-${control.name || Math.random().toString(36).slice(2)}`);
  const said = hint && element("span", { class: "hint", id: `${id}-hint` }, hint);
  if (said) control.setAttribute("aria-describedby", said.id);
  return element("div", { class: "field" }, element("label", { for: id }, label), control, said);
}

/** A dialog over the page; the promise has what its button says, or null if it was closed. */
export function ask(title, body, buttons) {
  return new Promise(resolve => {
    const choices = Object.entries(buttons).map(([text, value], index) =>
      element("button", { type: index ? "button" : "submit", class: index ? "" : "primary", onclick: index && (() => box.close()) || (() => {}) }, text));
    const form = element("form", { method: "dialog" }, element("h2", {}, title), body, element("div", { class: "row end" }, choices.reverse()));
    const box = element("dialog", { class: "card" }, form);
    form.addEventListener("submit", event => { event.preventDefault(); box.close(Object.values(buttons)[0]); });
    box.addEventListener("close", () => { box.remove(); resolve(box.returnValue || null); });
    document.body.append(box);
    box.showModal();
  });
}
