// The session: sign in, sign out, and sign in again without losing what the page holds.

import { call, service } from "./api.js";
import { byId, notify } from "./dom.js";

const EXPIRED = "Your session has ended. Sign in again: everything you entered is kept.";
const WRONG_KEY = "This key is not valid. Check it and try again.";

const [view, studio, key, error] = ["sign-in", "studio", "api-key", "sign-in-error"].map(byId);
let focused = null; // what had the focus when the session ended

/** Ask for a key if the service requires one; calls `open` once at the start and after each sign-in. */
export async function startSession(open) {
  view.firstElementChild.addEventListener("submit", (event) => {
    event.preventDefault();
    signIn(open);
  });
  byId("sign-out").addEventListener("click", signOut);
  service.addEventListener("expired", () => ask(EXPIRED));
  const { answer } = await call("GET", "v1/session");
  await enter(answer, open);
}

async function enter(session, open) {
  if (session.requires_key && !session.signed_in) return ask();
  byId("owner").textContent = session.owner ?? "";
  byId("account").hidden = !session.requires_key;
  view.hidden = true;
  studio.hidden = false;
  await open();
}

function ask(reason = null) {
  if (!view.hidden) return;
  if (reason) byId("sign-in-reason").textContent = reason;
  focused = studio.contains(document.activeElement) ? document.activeElement : null;
  byId("confirm").close();
  studio.hidden = byId("account").hidden = true;
  view.hidden = false;
  key.focus();
}

async function signIn(open) {
  error.textContent = "";
  key.removeAttribute("aria-invalid");
  try {
    const { answer } = await call("POST", "v1/session", { api_key: key.value.trim() });
    key.value = "";
    await enter(answer, open);
    (focused ?? byId("field-prompt"))?.focus();
  } catch (failure) {
    error.textContent = failure.status === 401 ? WRONG_KEY : failure.message;
    key.setAttribute("aria-invalid", "true");
    key.focus();
  }
}

async function signOut() {
  try {
    await call("DELETE", "v1/session");
    location.replace(location.pathname); // leaves nothing of this owner behind
  } catch (failure) {
    notify(failure.message, { isError: true });
  }
}
