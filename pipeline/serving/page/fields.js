// A field of the form, built from its schema in the API's description.

import { create } from "./dom.js";
import { duration, nameOf, size } from "./format.js";

const LABELS = {
  fps: "Frames per second",
  input_reference: "First frame",
  num_frames: "Duration",
  num_inference_steps: "Steps, first frame",
  video_num_inference_steps: "Steps, video",
};
const PRESET_SECONDS = [1, 2, 5, 10];
const MAX_CHOICES = 4; // shown side by side

export const labelOf = (name) => LABELS[name] ?? nameOf(name);

/** Base of all fields: a label, a control, a hint and an error; `initial` is what the service assumes. */
class Field {
  /** element: holds the field; control: has the focus and is described by the hint and the error. */
  constructor(name, schema, control, { isGroup = false } = {}) {
    const id = `field-${name}`;
    Object.assign(this, { name, control, id });
    this.hint = schema.description ? create("p", { className: "hint", id: `${id}-hint` }, schema.description) : null;
    this.message = create("p", { className: "error", id: `${id}-error` });
    this.label = create(isGroup ? "legend" : "label", isGroup ? {} : { htmlFor: id }, labelOf(name));
    this.element = create(isGroup ? "fieldset" : "div", { className: "field" }, this.label);
    this.element.dataset.name = name;
    if (!isGroup) control.id = id;
    this.element.append(control, ...(this.hint ? [this.hint] : []), this.message);
    this.described = isGroup ? this.element : control;
    this.#describe();
    this.element.addEventListener("input", () => this.showError(""));
  }

  #describe() {
    const ids = [this.hint, this.message.textContent ? this.message : null].filter(Boolean).map((each) => each.id);
    if (ids.length) this.described.setAttribute("aria-describedby", ids.join(" "));
    else this.described.removeAttribute("aria-describedby");
  }

  showError(text) {
    if (this.message.textContent === text) return;
    this.message.textContent = text;
    this.#describe();
    if (text) this.described.setAttribute("aria-invalid", "true");
    else this.described.removeAttribute("aria-invalid");
  }

  focus() {
    this.control.focus();
  }

  get isEmpty() {
    return !this.value.trim();
  }

  reset() {
    this.value = this.initial;
  }

  /** Take over a value of a video; null: what the service assumes. */
  write(value) {
    this.value = value === null || value === undefined ? this.initial : String(value);
  }

  /** Names and values for the request: none for what the service assumes anyway. */
  entries() {
    return this.value === this.initial ? [] : [[this.name, this.value]];
  }
}

class TextField extends Field {
  constructor(name, schema, initial = "") {
    super(name, schema, create("textarea", { rows: 2, value: initial }));
    this.initial = initial;
  }

  get value() {
    return this.control.value;
  }

  set value(text) {
    this.control.value = text;
  }
}

/** A number, or numbers separated by commas where the schema has a list. */
class NumberField extends Field {
  constructor(name, schema, kinds, assumed) {
    const isWhole = kinds.every((kind) => (kind.items ?? kind).type === "integer");
    super(name, schema, create("input", { type: "text", inputMode: isWhole ? "numeric" : "decimal" }));
    this.initial = "";
    this.isList = kinds.some((kind) => kind.type === "array");
    this.assume(assumed);
  }

  /** Show what the service assumes for an empty field. */
  assume(value) {
    this.control.placeholder = value === undefined || value === null ? "Automatic" : [value].flat().join(", ");
  }

  get value() {
    return this.control.value.trim();
  }

  set value(text) {
    this.control.value = text.replaceAll(",", ", ");
  }

  entries() {
    const parts = this.value.split(/[\s,]+/).filter(Boolean);
    return this.isList && parts.length > 1 ? parts.map((part) => [`${this.name}[]`, part]) : super.entries();
  }
}

class SelectField extends Field {
  constructor(name, schema, options, initial) {
    super(name, schema, create("select", {}));
    this.control.append(...options.map(([value, text]) => new Option(text, value)));
    this.initial = initial ?? options[0][0];
    this.reset();
  }

  get value() {
    return this.control.value;
  }

  set value(value) {
    this.control.value = value;
    if (this.control.value !== value) this.control.append(new Option(value, value, true, true)); // the service refuses it
  }
}

/** A few values side by side. */
class ChoiceField extends Field {
  constructor(name, schema, options, initial) {
    const radios = options.map(([value, text]) => {
      const radio = create("input", { type: "radio", name: `choice-${name}`, value });
      return create("label", { className: "choice" }, radio, create("span", {}, text));
    });
    super(name, schema, create("div", { className: "choices" }, ...radios), { isGroup: true });
    this.radios = radios.map((label) => label.firstChild);
    this.initial = initial;
    this.reset();
  }

  get value() {
    return this.radios.find((radio) => radio.checked)?.value ?? this.initial;
  }

  set value(value) {
    for (const radio of this.radios) radio.checked = radio.value === value;
  }

  focus() {
    (this.radios.find((radio) => radio.checked) ?? this.radios[0]).focus();
  }
}

/** A length in frames, shown in seconds, with buttons for the usual ones. */
class DurationField extends SelectField {
  constructor(name, schema, lengths, initial, fps) {
    super(name, schema, lengths.map((count) => [String(count), duration(count, fps)]), initial);
    const usual = new Set(PRESET_SECONDS.map((wanted) => lengths.find((count) => count - 1 >= wanted * fps)));
    const shown = lengths.filter((count) => count === 1 || usual.has(count) || count === lengths.at(-1));
    this.buttons = shown.map((count) => {
      const text = count === 1 ? "Still" : `${Number(((count - 1) / fps).toFixed(1))} s`;
      const press = () => {
        this.value = String(count);
        this.element.dispatchEvent(new Event("input", { bubbles: true }));
      };
      return create("button", { type: "button", value: String(count), onclick: press }, text);
    });
    const group = create("div", { className: "presets", role: "group", "aria-label": "Usual durations" });
    group.append(...this.buttons);
    this.control.after(group);
    this.control.addEventListener("change", () => this.#mark());
    this.#mark();
  }

  get value() {
    return super.value;
  }

  set value(value) {
    super.value = value;
    if (this.buttons) this.#mark();
  }

  #mark() {
    for (const button of this.buttons) button.setAttribute("aria-pressed", String(button.value === this.value));
  }
}

export { Field };

/**
 * Build the field of a property.
 *
 * assumed: what the service assumes if the field is left out; fps: of the model; isMain: room for several choices.
 */
export function fieldFor(name, schema, { assumed, fps, isMain }) {
  const kinds = (schema.anyOf ?? schema.oneOf ?? [schema]).filter((kind) => kind.type !== "null");
  const initial = assumed ?? schema.default ?? null;
  const values = kinds.flatMap((kind) => kind.enum ?? []);
  if (name === "num_frames" && values.length) return new DurationField(name, schema, values, String(initial), fps);
  if (values.length || kinds.some((kind) => kind.type === "boolean")) {
    const options = values.length
      ? values.map((each) => [String(each), name === "size" ? size(each) : nameOf(String(each))])
      : [["true", "Yes"], ["false", "No"]];
    if (initial === null) options.unshift(["", "Automatic"]);
    const Kind = isMain && name !== "size" && options.length <= MAX_CHOICES ? ChoiceField : SelectField;
    return new Kind(name, schema, options, initial === null ? "" : String(initial));
  }
  const isNumber = (kind) => ["integer", "number"].includes((kind.items ?? kind).type);
  if (kinds.length && kinds.every(isNumber)) return new NumberField(name, schema, kinds, initial);
  return new TextField(name, schema, initial === null ? "" : String(initial));
}
