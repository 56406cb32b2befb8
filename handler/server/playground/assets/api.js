// The worker's API. Errors are in its own words; where it wants a key, it asks once.

const AWAY = "The worker does not answer. It may have stopped or be starting; check that it runs, then try again.";
const CUT = "The answer ended before the picture was there. Try again.";
const encoded = key => String.fromCharCode(...new TextEncoder().encode(key));

export class ApiError extends Error {
  constructor(message, { status = 0, param = null } = {}) {
    super(message);
    Object.assign(this, { status, param });
  }
}

/** `keys`: { get(), ask(tried, at) }. Paths are from the worker's root on. */
export function connect(root, keys) {
  async function call(path, options = {}) {
    const key = keys.get(), at = Date.now();
    const headers = { ...options.headers, ...(key && { authorization: `Bearer ${encoded(key)}` }) };
    const answer = await reached(fetch(root + path.replace(/^\//, ""), { ...options, headers }));
    if (answer.status !== 401) return answer.ok ? answer : fail(answer);
    const other = await keys.ask(key, at);
    return other === null ? fail(answer) : call(path, options);
  }

  const json = (method, body, more) => body === undefined || body instanceof Blob ? { method, body, ...more }
    : { method, body: JSON.stringify(body), ...more, headers: { "content-type": "application/json", ...more?.headers } };

  return {
    get: async (path, options) => content(await call(path, options)),
    send: async (method, path, body, options) => content(await call(path, json(method, body, options))),
    async *events(path, body, options) {
      const answer = await call(path, json("POST", body, options));
      let whole = false;
      for await (const text of read(answer)) {
        const said = JSON.parse(text);
        if (said.error) throw new ApiError(said.error.message, { status: answer.status, ...said.error });
        whole ||= said.type.endsWith(".completed");
        yield said;
      }
      if (!whole) throw new ApiError(CUT);
    },
  };
}

async function reached(answer) {
  try {
    return await answer;
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError(AWAY);
  }
}

const content = answer => answer.status === 204 ? null : reached(answer.json());

async function fail(answer) {
  const said = await answer.json().catch(() => null);
  const error = said?.error?.message ? said.error : { message: `The worker answered with status ${answer.status}.${answer.status < 500 ? "" : " Try again in a moment."}` };
  const message = error.details ? `${error.message}: ${error.details}` : error.message; // as ComfyUI's
  throw new ApiError(message, { ...error, status: answer.status });
}

async function* read(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reached(reader.read());
      if (done) return;
      rest += value;
      if (!value.includes("\n")) continue; // a picture comes in many pieces
      const blocks = rest.split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.match(/^data: .*/gm)?.map(line => line.slice(6)).join("\n");
        if (data) yield data;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
