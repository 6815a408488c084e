// Calls of the API with the session's cookie, and whether the service can be reached.

const TIMEOUT_MS = 90_000; // longer than the service waits for a body
const MAX_PROBE_MS = 10_000;
const GATEWAY_ERRORS = [502, 503, 504]; // of a proxy whose service is away

export class ApiError extends Error {
  constructor(status, { message = `HTTP status ${status}`, param = null } = {}, retryAfter = null) {
    super(retryAfter ? `${message}; try again in ${retryAfter} s` : message);
    Object.assign(this, { status, param });
  }
}

/** Dispatches "lost" and "restored" for the connection, and "expired" when the session has ended. */
export const service = new EventTarget();

let isLost = false;
let probing;
let clockAhead_ms = 0;

/** The service's time in seconds since 1970. */
export const now = () => (Date.now() + clockAhead_ms) / 1000;

/** Send a request; returns the answer's object and headers. Throws ApiError; status 0: no answer. */
export async function call(method, path, body = undefined, headers = {}) {
  const isJson = body !== undefined && !(body instanceof FormData);
  let response;
  try {
    response = await fetch(path, {
      method,
      body: isJson ? JSON.stringify(body) : body,
      headers: isJson ? { "Content-Type": "application/json", ...headers } : headers,
      signal: AbortSignal.timeout(TIMEOUT_MS),
    });
    if (GATEWAY_ERRORS.includes(response.status)) throw new TypeError("no service");
  } catch {
    lose();
    throw new ApiError(0, { message: "The service does not answer. Try again in a moment." });
  }
  restore();
  clockAhead_ms = (Date.parse(response.headers.get("Date")) || Date.now()) - Date.now();
  const answer = await response.json().catch(() => ({}));
  if (response.ok) return { answer, headers: response.headers };
  if (response.status === 401 && path !== "v1/session") service.dispatchEvent(new Event("expired"));
  throw new ApiError(response.status, answer.error, response.headers.get("Retry-After"));
}

export const videoPath = (id, rest = "") => `v1/videos/${encodeURIComponent(id)}${rest}`;

function lose() {
  if (isLost) return;
  isLost = true;
  service.dispatchEvent(new Event("lost"));
  probe(1000);
}

function restore() {
  if (!isLost) return;
  isLost = false;
  clearTimeout(probing);
  service.dispatchEvent(new Event("restored"));
}

/** Ask again and again, ever less often, until the service answers. */
function probe(wait_ms) {
  clearTimeout(probing);
  probing = setTimeout(async () => {
    await call("GET", "v1/session").catch(() => null);
    if (isLost) probe(Math.min(2 * wait_ms, MAX_PROBE_MS));
  }, wait_ms);
}

addEventListener("offline", lose);
addEventListener("online", () => isLost && probe(0));
