// The tabs: each has a module, which is loaded when it is first shown.

import { create } from "./app.js";
import { banner } from "./banner.js";
import { style, wrong } from "./dom.js";
import { watch } from "./dropping.js";
import { follow } from "./status.js";

const TABS = { make: "Make", workflows: "Workflows", worker: "Worker", deploy: "Deploy" };
const mounted = {};
const app = create(open);

async function mount(name) {
  const section = document.getElementById(name);
  try {
    document.head.append(style(`${name}.css`));
    const tab = await import(`./${name}.js`);
    await tab.mount(section, app);
    return tab;
  } catch (error) {
    delete mounted[name];
    console.error(error);
    section.replaceChildren(wrong("This part of the page could not be loaded. Load the page again."));
  }
}

/** Show a tab; the promise is kept once it can be used. */
async function open(name) {
  if ((location.hash || "#make") !== `#${name}`) history.pushState(null, "", `#${name}`);
  for (const each of Object.keys(TABS)) document.getElementById(each).hidden = each !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${TABS[name]} · Kindling`;
  const tab = await (mounted[name] ||= mount(name));
  tab?.shown?.();
}

function shown() {
  const name = location.hash.slice(1);
  if (name === "main") return;
  open(Object.hasOwn(TABS, name) ? name : "make");
}

document.querySelector(".skip").addEventListener("click", event => {
  event.preventDefault();
  document.getElementById("main").focus();
});
document.getElementById("key").addEventListener("click", () => app.changeKey());
watch(app);
addEventListener("hashchange", shown);
shown();
banner(document.getElementById("banner"), app);
follow(app, () => location.hash === "#worker");
