// A brush: where a picture is drawn anew.

import { element } from "./dom.js";

const LARGEST = 1024; // pixels of the mask's longer side; the worker stretches it to its image
const NUDGES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const HELP = "Draw over what shall change. By keyboard: arrows move the brush, Space puts it down and lifts it, [ and ] change its size, E erases, Ctrl and Z undo.";

/** What is seen on every picture. */
function stripes(pen) {
  const tile = element("canvas", { width: 12, height: 12 }), over = tile.getContext("2d");
  for (const [colour, from] of [["#f40", 0], ["#fff", 6]]) {
    over.fillStyle = colour;
    for (let row = 0; row < 12; row++) for (const left of [0, 12, -12]) over.fillRect(from + row + left, row, 6, 1);
  }
  return pen.createPattern(tile, "repeat");
}

/** Put a brush over `image` into `host`. The promise of `blob()` is a PNG of the image's shape, transparent where it is
 * to be drawn anew and black elsewhere; null if nothing is marked. */
export function brush(host, image) {
  const scale = Math.min(1, LARGEST / Math.max(image.width, image.height));
  const size = { width: Math.max(1, Math.round(image.width * scale)), height: Math.max(1, Math.round(image.height * scale)) };
  const below = element("canvas", { ...size, "aria-hidden": "true" });
  below.getContext("2d").drawImage(image, 0, 0, size.width, size.height);
  const marks = element("canvas", { ...size, class: "marks", tabindex: 0, role: "img", "aria-describedby": "brush-help" });
  const pen = marks.getContext("2d", { willReadFrequently: true });
  const ink = stripes(pen);
  const ring = element("div", { class: "ring", hidden: true });
  const easel = element("div", { class: "easel" }, below, marks, ring);
  easel.style.width = `min(100%, ${(70 * size.width) / size.height}vh)`;
  const said = element("p", { class: "unseen", role: "status" });
  const width = element("input", { type: "range", id: "brush-size", min: 1, max: 40, value: 10, oninput: () => place() });
  const erase = element("button", { type: "button", "aria-pressed": "false", onclick: () => erasing(!erases()) }, "Erase");
  const button = (text, act) => element("button", { type: "button", onclick: act }, text);
  const undo = button("Undo", () => { done.pop(); paint(); });
  const done = []; // what was done: strokes { path, radius, erase }, or "invert"
  let at = [size.width / 2, size.height / 2], stroke = null;

  const radius = () => Math.max(1, (Number(width.value) / 200) * Math.max(size.width, size.height));
  const erases = () => erase.getAttribute("aria-pressed") === "true";
  const erasing = on => { erase.setAttribute("aria-pressed", String(on)); tell(on ? "Erasing." : "Marking."); };
  const tell = text => { said.textContent = text; };

  function draw({ path, radius, erase }, from = 0) {
    pen.globalCompositeOperation = erase ? "destination-out" : "source-over";
    pen.strokeStyle = pen.fillStyle = ink;
    Object.assign(pen, { lineCap: "round", lineJoin: "round", lineWidth: 2 * radius });
    pen.beginPath();
    const [first, ...rest] = path.slice(from);
    if (!rest.length) pen.arc(...first, radius, 0, 2 * Math.PI), pen.fill();
    pen.moveTo(...first);
    for (const point of rest) pen.lineTo(...point);
    if (rest.length) pen.stroke();
  }

  /** All of it anew, after something was taken back or turned round. */
  function paint() {
    pen.clearRect(0, 0, size.width, size.height);
    for (const each of done) each === "invert" ? turn() : draw(each);
    undo.disabled = !done.length;
    marks.setAttribute("aria-label", `The picture; ${Math.round(100 * share())} percent of it is marked`);
  }

  function turn() {
    pen.globalCompositeOperation = "source-out";
    pen.fillStyle = ink;
    pen.fillRect(0, 0, size.width, size.height);
  }

  function share() {
    const { data } = pen.getImageData(0, 0, size.width, size.height);
    let marked = 0;
    for (let each = 3; each < data.length; each += 4) marked += data[each] > 127;
    return marked / (size.width * size.height);
  }

  function place(point = at) {
    at = [Math.min(size.width, Math.max(0, point[0])), Math.min(size.height, Math.max(0, point[1]))];
    const box = marks.getBoundingClientRect(), shown = box.width / size.width;
    Object.assign(ring.style, { left: `${at[0] * shown}px`, top: `${at[1] * shown}px`, width: `${2 * radius() * shown}px`, height: `${2 * radius() * shown}px` });
  }

  function begin() {
    done.push((stroke = { path: [at], radius: radius(), erase: erases() }));
    draw(stroke);
  }

  function go(points) {
    if (stroke) {
      const from = stroke.path.length - 1;
      stroke.path.push(...points);
      draw(stroke, from);
    }
    place(points.at(-1));
  }

  function end() {
    if (stroke) stroke = null, paint();
  }

  const point = event => {
    const box = marks.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * size.width, ((event.clientY - box.top) / box.height) * size.height];
  };
  marks.addEventListener("pointerdown", event => {
    if (event.button) return;
    end();
    marks.setPointerCapture(event.pointerId);
    ring.hidden = false;
    place(point(event));
    begin();
  });
  marks.addEventListener("pointermove", event => {
    ring.hidden = false;
    const all = event.getCoalescedEvents?.() || [];
    go((all.length ? all : [event]).map(point));
  });
  for (const name of ["pointerup", "pointercancel"]) marks.addEventListener(name, end);
  marks.addEventListener("pointerleave", () => { ring.hidden = document.activeElement !== marks; });
  marks.addEventListener("focus", () => { ring.hidden = false; place(); });
  marks.addEventListener("blur", () => { ring.hidden = true; end(); });
  marks.addEventListener("keydown", event => {
    const keys = { " ": () => stroke ? (end(), tell("Lifted.")) : (begin(), tell("Down.")), e: () => erasing(!erases()),
      "[": () => { width.stepDown(2); place(); }, "]": () => { width.stepUp(2); place(); } };
    const nudge = NUDGES[event.key], key = event.key.toLowerCase();
    if (nudge) go([nudge.map((way, axis) => at[axis] + way * (event.shiftKey ? 1 : Math.max(2, radius() / 2)))]);
    else if (key === "z" && (event.ctrlKey || event.metaKey)) { end(); undo.click(); }
    else if (keys[key] && !event.ctrlKey && !event.metaKey) keys[key]();
    else return;
    event.preventDefault();
  });

  host.append(element("link", { rel: "stylesheet", href: new URL("mask.css", import.meta.url).href }),
    element("div", { class: "row tools" }, element("label", { for: "brush-size" }, "Brush"), width, erase, undo,
      button("Invert", () => { end(); done.push("invert"); paint(); }),
      button("Clear", () => { end(); done.length = 0; paint(); })),
    easel, element("p", { class: "hint", id: "brush-help" }, HELP), said);
  paint();

  return {
    async blob() {
      if (!share()) return null;
      const mask = element("canvas", size), over = mask.getContext("2d");
      over.fillRect(0, 0, size.width, size.height);
      over.globalCompositeOperation = "destination-out";
      over.drawImage(marks, 0, 0);
      return new Promise(resolve => mask.toBlob(resolve, "image/png"));
    },
  };
}
