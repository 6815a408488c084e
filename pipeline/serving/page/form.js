// The form of a new video, built from the API's description: two tabs, the main fields, and all others.

import { call } from "./api.js";
import { byId, notify } from "./dom.js";
import { fieldFor, labelOf } from "./fields.js";
import { PictureField } from "./picture.js";

const PICTURE = "input_reference";
const MAIN = [PICTURE, "prompt", "quality", "size", "num_frames", "guidance_scale", "video_guidance_scale", "seed"];
// What the page decides by itself, or offers in another way.
const LEFT_OUT = ["model", "id", "height", "width", "seconds", "image_reference", "num_videos_per_prompt"];
const OF_PICTURES = [PICTURE, "image_fit"];
const SET_BY_QUALITY = ["num_inference_steps", "video_num_inference_steps", "skip_last_step", "guided_share"];
const ASSUMED = { quality: "standard", priority: "interactive" }; // where the schema has no default

export class Form {
  #fields = new Map();
  #properties = {};
  #mode = "text";
  #key = null; // of a request whose answer is not known: sent again, it makes no second video

  /** created: called with each new video. */
  constructor(created) {
    this.created = created;
    this.form = byId("tab-panel");
    this.tabs = [...document.querySelectorAll("[role=tab]")];
    for (const tab of this.tabs) tab.addEventListener("click", () => this.#choose(tab.id));
    this.tabs[0].parentElement.addEventListener("keydown", (event) => this.#onKey(event));
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.form.addEventListener("input", (event) => this.#changed(event.target.closest("[data-name]")?.dataset.name));
    this.form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    });
    byId("reset").addEventListener("click", () => this.#reset());
    document.addEventListener("paste", (event) => this.#paste(event));
  }

  get isBuilt() {
    return this.#fields.size > 0;
  }

  /** Build the fields. description: of the API, in OpenAPI; model: the one that is served. */
  build(description, model) {
    const { schema } = description.paths["/v1/videos"].post.requestBody.content["multipart/form-data"];
    this.#properties = schema.properties;
    this.model = model;
    const assumed = { ...ASSUMED, ...model, size: model.sizes[0], num_frames: model.max_num_frames };
    for (const name of SET_BY_QUALITY) delete assumed[name];
    const names = Object.keys(schema.properties).filter((name) => !LEFT_OUT.includes(name));
    for (const name of [...MAIN.filter((each) => names.includes(each)), ...names]) {
      if (this.#fields.has(name)) continue;
      const isMain = MAIN.includes(name);
      const property = { ...schema.properties[name] };
      if (isMain) delete property.description; // these explain themselves
      const options = { assumed: assumed[name], fps: model.fps, isMain };
      const field = name === PICTURE ? new PictureField(name, property) : fieldFor(name, property, options);
      this.#fields.set(name, field);
      byId(isMain ? "main-fields" : "more-fields").append(field.element);
    }
    this.#field("prompt").control.placeholder = "What to show";
    this.#field("seed").assume("Random");
    this.#choose("text");
  }

  label = labelOf;

  /** Names of a video's settings: all that a request can have. */
  settings(video) {
    const names = Object.keys(this.#properties).filter((name) => name === "model" || !LEFT_OUT.includes(name));
    return names.filter((name) => (video[name] ?? null) !== null);
  }

  /** Copy the settings of a video. */
  use(video) {
    const hasPicture = video.image_fit !== null;
    this.#choose(hasPicture ? "image" : "text");
    for (const [name, field] of this.#fields) {
      if (name in video) field.write(name === "seed" ? video.seed_text : video[name]);
      field.showError("");
    }
    this.#key = null;
    const needsPicture = hasPicture && this.#field(PICTURE).isEmpty;
    notify(needsPicture ? "Settings copied. Choose the first frame again." : "Settings copied into the form.");
    this.#field(needsPicture ? PICTURE : "prompt").focus();
  }

  #field(name) {
    return this.#fields.get(name);
  }

  #choose(mode) {
    this.#mode = mode;
    for (const tab of this.tabs) {
      const isChosen = tab.id === mode;
      tab.setAttribute("aria-selected", String(isChosen));
      tab.tabIndex = isChosen ? 0 : -1;
      if (isChosen) this.form.setAttribute("aria-labelledby", tab.id);
    }
    for (const [name, field] of this.#fields) field.element.hidden = mode === "text" && OF_PICTURES.includes(name);
    const guidance = mode === "image" ? "image_to_video_guidance_scale" : "video_guidance_scale";
    this.#field("video_guidance_scale")?.assume(this.model[guidance]);
  }

  #onKey(event) {
    const at = this.tabs.indexOf(document.activeElement);
    const steps = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: -1 };
    if (at < 0 || !(event.key in steps)) return;
    event.preventDefault();
    const tab = this.tabs.at(steps[event.key] % this.tabs.length);
    tab.focus();
    this.#choose(tab.id);
  }

  #changed(name) {
    this.#key = null;
    byId("form-error").textContent = "";
    if (name === "quality") for (const each of SET_BY_QUALITY) this.#field(each)?.reset(); // a preset of these
  }

  #reset() {
    for (const field of this.#fields.values()) {
      field.reset();
      field.showError("");
    }
    this.#changed();
    this.#field("prompt").focus();
  }

  #paste(event) {
    const { files, types } = event.clipboardData;
    if (!files.length || types.includes("text/plain") || !this.isBuilt || byId("studio").hidden) return;
    event.preventDefault();
    this.#choose("image");
    this.#field(PICTURE).take(files);
  }

  async #submit() {
    const button = byId("make");
    if (button.ariaDisabled === "true" || !this.#check()) return;
    button.ariaDisabled = "true"; // keeps the focus, unlike `disabled`
    const body = new FormData();
    const fields = [...this.#fields.values()].filter((field) => !field.element.hidden);
    for (const [name, value] of fields.flatMap((field) => field.entries())) body.append(name, value);
    this.#key ??= [...crypto.getRandomValues(new Uint32Array(4))].join("-");
    try {
      const { answer } = await call("POST", "v1/videos", body, { "Idempotency-Key": this.#key });
      this.#key = null;
      this.created(answer);
    } catch (error) {
      if (error.status) this.#key = null;
      if (error.status !== 401) this.#fail(error.message, error.param);
    }
    button.ariaDisabled = "false";
  }

  /** Check what the page can tell by itself. */
  #check() {
    const picture = this.#field(PICTURE);
    if (this.#mode === "image" && picture.fault) return this.#fail(picture.fault, PICTURE);
    if (this.#field("prompt").isEmpty) return this.#fail("Describe the video first.", "prompt");
    return true;
  }

  /** Say what is wrong at its field, or below the form; returns false. */
  #fail(message, name) {
    const field = this.#field(name);
    if (field && !field.element.hidden) {
      if (!MAIN.includes(name)) byId("more").open = true;
      field.showError(message);
      field.focus();
    } else {
      byId("form-error").textContent = message;
    }
    return false;
  }
}
