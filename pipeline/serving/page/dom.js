// Elements: find one by its id, create one with text and children. Text never becomes HTML.

export const byId = (id) => document.getElementById(id);

export function create(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name in element && !name.startsWith("aria-")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Show a message for a while; an error stays until it is dismissed. Returns its element. */
export function notify(message, { isError = false, shown_ms = 6000 } = {}) {
  const notice = byId("notices").appendChild(create("p", { className: isError ? "notice error" : "notice" }, message));
  if (isError) notice.append(create("button", { type: "button", onclick: () => notice.remove() }, "Dismiss"));
  else if (shown_ms) setTimeout(() => notice.remove(), shown_ms);
  return notice;
}
