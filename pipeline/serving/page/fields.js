// Fields of the form, built from their schemas in the API's description.

import { create } from "./dom.js";
import { duration, nameOf, seconds, size } from "./format.js";

const LABELS = {
  fps: "Frames per second",
  input_reference: "First frame",
  num_frames: "Duration",
  num_inference_steps: "Steps",
  video_num_inference_steps: "Video steps",
};
const USUAL_SECONDS = [1, 2, 5, 10];
const MAX_CHOICES = 4; // shown side by side

export const labelOf = (name) => LABELS[name] ?? nameOf(name);

/** A label, a control, a hint and an error. `initial` stands for what the service assumes, and is not sent. */
export class Field {
  constructor(name, schema, control, { initial = "", isGroup = false, isList = false } = {}) {
    Object.assign(this, { name, control, initial, isList });
    const id = `field-${name}`;
    const label = create(isGroup ? "legend" : "label", isGroup ? {} : { htmlFor: id }, labelOf(name));
    this.hint = create("p", { className: "hint", id: `${id}-hint` }, schema.description ?? "");
    this.error = create("p", { className: "error", id: `${id}-error` });
    this.element = create(isGroup ? "fieldset" : "div", { className: "field" }, label, control, this.hint, this.error);
    this.element.dataset.name = name;
    this.element.addEventListener("input", () => this.showError(""));
    this.described = isGroup ? this.element : control;
    this.described.id = id;
    this.showError("");
  }

  get value() {
    return this.control.inputMode ? this.control.value.trim() : this.control.value;
  }

  set value(value) {
    this.control.value = value;
    if (this.control.options && this.control.value !== value) this.control.append(new Option(value, value, true, true));
  }

  get isEmpty() {
    return !this.value.trim();
  }

  /** Show what the service assumes for an empty field. */
  assume(value) {
    this.control.placeholder = [value ?? "Automatic"].flat().join(", ");
  }

  showError(text) {
    this.error.textContent = text;
    const texts = [this.hint, this.error].filter((each) => each.textContent);
    this.described.setAttribute("aria-describedby", texts.map((each) => each.id).join(" "));
    this.described.setAttribute("aria-invalid", String(text !== ""));
  }

  focus() {
    this.control.focus();
  }

  reset() {
    this.value = this.initial;
  }

  /** Take over a value of a video. */
  write(value) {
    this.value = value === null ? this.initial : [value].flat().join(", ");
  }

  /** Names and values for the request. */
  entries() {
    if (this.value === this.initial) return [];
    const parts = this.isList ? this.value.split(/[\s,]+/).filter(Boolean) : [];
    return parts.length > 1 ? parts.map((part) => [`${this.name}[]`, part]) : [[this.name, this.value]];
  }
}

/** A few values side by side. */
class ChoiceField extends Field {
  constructor(name, schema, options, initial) {
    const radios = options.map(([value]) => create("input", { type: "radio", name: `choice-${name}`, value }));
    const labels = options.map(([, text], number) =>
      create("label", { className: "choice" }, radios[number], create("span", {}, text)),
    );
    super(name, schema, create("div", { className: "choices" }, ...labels), { initial, isGroup: true });
    this.radios = radios;
    this.reset();
  }

  get value() {
    return this.radios?.find((radio) => radio.checked)?.value ?? this.initial;
  }

  set value(value) {
    for (const radio of this.radios) radio.checked = radio.value === value;
  }

  focus() {
    this.radios.find((radio) => radio.checked)?.focus();
  }
}

/** A length in frames, shown in seconds, with buttons for the usual ones. */
class DurationField extends Field {
  constructor(name, schema, control, initial, lengths, fps) {
    super(name, schema, control, { initial });
    const usual = USUAL_SECONDS.map((wanted) => lengths.find((count) => count - 1 >= wanted * fps));
    const shown = lengths.filter((count) => [1, lengths.at(-1), ...usual].includes(count));
    this.buttons = shown.map((count) => {
      const text = count === 1 ? "Still" : `${Number(seconds(count, fps).toFixed(1))} s`;
      return create("button", { type: "button", value: count, onclick: () => this.#press(count) }, text);
    });
    const options = { className: "presets", role: "group", "aria-label": "Usual durations" };
    control.after(create("div", options, ...this.buttons));
    control.addEventListener("change", () => this.#mark());
    this.reset();
  }

  reset() {
    this.write(this.initial);
  }

  write(value) {
    super.write(value);
    this.#mark();
  }

  #press(count) {
    this.write(count);
    this.control.dispatchEvent(new Event("input", { bubbles: true }));
  }

  #mark() {
    for (const button of this.buttons) button.setAttribute("aria-pressed", String(button.value === this.value));
  }
}

/**
 * Build the field of a property.
 *
 * assumed: what the service assumes if the field is left out; fps: of the model; isMain: has room for several choices.
 */
export function fieldFor(name, schema, { assumed, fps, isMain }) {
  const kinds = (schema.anyOf ?? schema.oneOf ?? [schema]).filter((kind) => kind.type !== "null");
  const initial = assumed ?? schema.default ?? null;
  const values = kinds.flatMap((kind) => kind.enum ?? (kind.type === "boolean" ? [true, false] : []));
  if (values.length) {
    const options = values.map((each) => [String(each), optionText(name, each, fps)]);
    if (initial === null) options.unshift(["", "Automatic"]);
    const first = String(initial ?? "");
    const isShort = isMain && values.every(isNaN) && name !== "size" && options.length <= MAX_CHOICES;
    if (isShort) return new ChoiceField(name, schema, options, first);
    const control = create("select", {}, ...options.map(([value, text]) => new Option(text, value)));
    control.value = first;
    return name === "num_frames"
      ? new DurationField(name, schema, control, first, values, fps)
      : new Field(name, schema, control, { initial: first });
  }
  const types = kinds.map((kind) => kind.items?.type ?? kind.type);
  if (types.every((type) => type === "integer" || type === "number")) {
    const inputMode = types.includes("number") ? "decimal" : "numeric";
    const control = create("input", { inputMode, autocomplete: "off" });
    const field = new Field(name, schema, control, { isList: kinds.some((kind) => kind.type === "array") });
    field.assume(initial);
    return field;
  }
  const text = String(initial ?? "");
  return new Field(name, schema, create("textarea", { rows: 2, value: text }), { initial: text });
}

function optionText(name, value, fps) {
  if (name === "size") return size(value);
  if (name === "num_frames") return duration(value, fps);
  if (typeof value === "boolean") return value ? "Yes" : "No";
  return nameOf(value);
}
