// How the worker is: asked again and again while somebody looks, and told to all as "status".

const AGAIN_MS = { starting: 1000, looked: 2000, else: 20000 };

/** Begin; `looked()` says whether somebody looks at the figures, and "look" that they begin to. What is told is /v1/status's answer; where none comes,
 * the last one, with the status "away", the reason why, and what the worker itself gave for a reason before. */
export function follow(app, looked) {
  let timer, asking = false, known = {};

  async function look() {
    clearTimeout(timer);
    if (document.hidden || asking) return;
    asking = true;
    let told;
    try {
      told = known = await app.api.get("v1/status");
    } catch (error) {
      if (error.status === 401) return; // until there is a key
      told = { ...known, status: "away", reason: error.message, before: known.reason };
    } finally {
      asking = false;
    }
    app.emit("status", told);
    timer = setTimeout(look, AGAIN_MS[told.status] || (looked() ? AGAIN_MS.looked : AGAIN_MS.else));
  }

  document.addEventListener("visibilitychange", look);
  app.on("look", look);
  app.on("key", look);
  look();
}
