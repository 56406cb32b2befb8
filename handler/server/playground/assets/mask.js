// A brush: where a picture is drawn anew.

import { button, element, style } from "./dom.js";

const LARGEST = 1024; // pixels of the mask's longer side; the worker stretches it to its image
const INK = "#f50";
const NUDGES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const HELP = "Draw over what shall change. Keys: arrows move the brush, Space puts it down and lifts it, [ and ] change its size, E erases, Ctrl and Z undo.";

/** Put a brush over `image` into `host`. The promise of `blob()` is a PNG of the image's shape, transparent where it is
 * to be drawn anew and black elsewhere; null if nothing is marked. */
export function brush(host, image) {
  const scale = Math.min(1, LARGEST / Math.max(image.width, image.height));
  const [width, height] = [image.width, image.height].map(side => Math.max(1, Math.round(side * scale)));
  const below = element("canvas", { width, height, "aria-hidden": "true" });
  below.getContext("2d").drawImage(image, 0, 0, width, height);
  const marks = element("canvas", { width, height, class: "marks", tabindex: 0, role: "img", "aria-describedby": "brush-help" });
  const pen = marks.getContext("2d", { willReadFrequently: true });
  const ring = element("div", { class: "ring", hidden: true });
  const easel = element("div", { class: "easel" }, below, marks, ring);
  easel.style.width = `min(100%, ${(70 * width) / height}vh)`;
  const said = element("p", { class: "unseen", role: "status" });
  const size = element("input", { type: "range", id: "brush-size", min: 1, max: 40, value: 10, oninput: () => place(at) });
  const erase = button("Erase", () => turn(), { "aria-pressed": "false" });
  const undo = button("Undo", () => { done.pop(); paint(); });
  const done = []; // strokes { path, radius, erase }, and "invert"
  let at = [width / 2, height / 2], stroke = null;

  const radius = () => Math.max(1, (size.value / 200) * Math.max(width, height));
  const erases = () => erase.getAttribute("aria-pressed") === "true";
  const tell = text => { said.textContent = text; };
  const turn = () => { erase.setAttribute("aria-pressed", !erases()); tell(erases() ? "Erasing." : "Marking."); };

  function draw({ path, radius, erase }, from = 0) {
    const [first, ...rest] = path.slice(from);
    Object.assign(pen, { globalCompositeOperation: erase ? "destination-out" : "source-over", strokeStyle: INK, lineCap: "round", lineJoin: "round", lineWidth: 2 * radius });
    pen.beginPath();
    pen.moveTo(...first);
    for (const [x, y] of [first, ...rest]) pen.lineTo(x + .01, y); // a line of no length has no ends in newer browsers
    pen.stroke();
  }

  function paint() {
    pen.clearRect(0, 0, width, height);
    for (const each of done) {
      if (each !== "invert") draw(each);
      else Object.assign(pen, { globalCompositeOperation: "source-out", fillStyle: INK }).fillRect(0, 0, width, height);
    }
    undo.disabled = !done.length;
    marks.setAttribute("aria-label", `The picture; ${Math.round(100 * share())} percent of it is marked`);
  }

  function share() {
    const { data } = pen.getImageData(0, 0, width, height);
    let marked = 0;
    for (let each = 3; each < data.length; each += 4) marked += data[each] > 127;
    return marked / (width * height);
  }

  function place([x, y]) {
    at = [Math.min(width, Math.max(0, x)), Math.min(height, Math.max(0, y))];
    const shown = marks.getBoundingClientRect().width / width, across = `${2 * radius() * shown}px`;
    Object.assign(ring.style, { left: `${at[0] * shown}px`, top: `${at[1] * shown}px`, width: across, height: across });
    ring.hidden = false;
  }

  function begin() {
    done.push((stroke = { path: [at], radius: radius(), erase: erases() }));
    draw(stroke);
  }

  function go(points) {
    if (stroke) draw(stroke, stroke.path.push(...points) - points.length - 1);
    place(points.at(-1));
  }

  function end() {
    if (stroke) stroke = null, paint();
  }

  const invert = () => { end(); done.push("invert"); paint(); };
  const clear = () => { end(); done.length = 0; paint(); };
  const point = event => {
    const box = marks.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
  };
  const keys = { " ": () => { stroke ? end() : begin(); tell(stroke ? "Down." : "Lifted."); }, e: turn,
    "[": () => { size.stepDown(2); place(at); }, "]": () => { size.stepUp(2); place(at); } };
  const listeners = {
    pointerdown: event => {
      if (event.button) return;
      end();
      marks.setPointerCapture(event.pointerId);
      place(point(event));
      begin();
    },
    pointermove: event => go([...(event.getCoalescedEvents?.() || []), event].map(point)),
    pointerup: end,
    pointercancel: end,
    pointerleave: () => { ring.hidden = document.activeElement !== marks; },
    focus: () => place(at),
    blur: () => { ring.hidden = true; end(); },
    keydown: event => {
      const nudge = NUDGES[event.key], key = event.key.toLowerCase(), with_ = event.ctrlKey || event.metaKey;
      if (nudge) go([nudge.map((way, axis) => at[axis] + way * (event.shiftKey ? 1 : Math.max(2, radius() / 2)))]);
      else if (with_ && key === "z") { end(); undo.click(); }
      else if (keys[key] && !with_) keys[key]();
      else return;
      event.preventDefault();
    },
  };
  for (const [name, listener] of Object.entries(listeners)) marks.addEventListener(name, listener);

  host.append(style("mask.css"),
    element("div", { class: "row tools" }, element("label", { for: size.id }, "Brush"), size, erase, undo, button("Invert", invert), button("Clear", clear)),
    easel, element("p", { class: "hint", id: "brush-help" }, HELP), said);
  paint();

  return {
    async blob() {
      if (!share()) return null;
      const mask = element("canvas", { width, height }), over = mask.getContext("2d");
      over.fillRect(0, 0, width, height);
      over.globalCompositeOperation = "destination-out";
      over.drawImage(marks, 0, 0);
      return new Promise(resolve => mask.toBlob(resolve));
    },
  };
}
