// How the worker is: asked again and again while somebody looks, and told to all as "status".

const AGAIN_MS = { starting: 1000, looked: 2000, else: 20000 };
const IDLE_MS = 60000; // then nobody is here: who is asked stays awake, and costs

/** `looked()` says whether somebody looks at the figures, and "look" that they begin to. Told is /v1/status's answer, or
 * the last one as "away", with why, and the worker's own reason from before; or why none will come, as "barred". */
export function follow(app, looked) {
  let timer = 0, asking = false, barred = false, active = performance.now(), known = {};
  const gone = () => document.hidden || (known.status !== "starting" && performance.now() - active > IDLE_MS);

  async function look() {
    clearTimeout(timer);
    timer = 0;
    if (asking || barred || gone()) return;
    asking = true;
    let told;
    try {
      told = known = await app.status();
    } catch (error) {
      if (barred = [401, 403].includes(error.status)) return app.emit("barred", error.message);
      told = { ...known, status: "away", reason: error.message, before: known.reason };
    } finally {
      asking = false;
    }
    app.emit("status", told);
    timer = setTimeout(look, AGAIN_MS[told.status] || (looked() ? AGAIN_MS.looked : AGAIN_MS.else));
  }

  function stir() {
    active = performance.now();
    if (!timer) look();
  }

  document.addEventListener("visibilitychange", stir);
  for (const name of ["pointermove", "pointerdown", "keydown", "focus"]) addEventListener(name, stir);
  for (const name of ["look", "key"]) app.on(name, () => {
    barred = false;
    look();
  });
  look();
}
