// The first frame of a video from a picture: chosen by button, dropped or pasted, with a preview.

import { create } from "./dom.js";
import { Field } from "./fields.js";

const MAX_BYTES = 24 * 2 ** 20; // the service reads bodies of up to 25 MiB
const TYPES = "image/png,image/jpeg,image/webp,image/gif,image/bmp,image/tiff";

export class PictureField extends Field {
  constructor(name, schema) {
    const input = create("input", { type: "file", accept: TYPES, className: "unseen" });
    super(name, schema, input);
    this.note = create("span", {}, "Choose, drop or paste a picture");
    this.preview = create("img", { alt: "Preview of the first frame", hidden: true });
    this.clear = create("button", { type: "button", hidden: true, className: "quiet" }, "Remove picture");
    this.zone = create("label", { className: "drop", htmlFor: input.id }, this.preview, this.note);
    input.after(this.zone, this.clear);
    input.addEventListener("change", () => this.#show());
    this.clear.addEventListener("click", () => {
      this.reset();
      this.focus();
    });
    this.zone.addEventListener("dragover", (event) => {
      event.preventDefault();
      this.zone.classList.add("over");
    });
    this.zone.addEventListener("dragleave", () => this.zone.classList.remove("over"));
    this.zone.addEventListener("drop", (event) => {
      event.preventDefault();
      this.zone.classList.remove("over");
      this.take(event.dataTransfer.files);
    });
  }

  get file() {
    return this.control.files[0] ?? null;
  }

  get isEmpty() {
    return !this.file;
  }

  /** Use the first of some files that is a picture. */
  take(files) {
    const picture = [...files].find((file) => file.type.startsWith("image/"));
    if (!picture) return this.showError("This file is not a picture.");
    const transfer = new DataTransfer();
    transfer.items.add(picture);
    this.control.files = transfer.files;
    this.#show();
  }

  reset() {
    this.control.value = "";
    this.#show();
  }

  write() {} // the API does not return pictures

  entries() {
    return this.file ? [[this.name, this.file]] : [];
  }

  /** What is wrong with the picture, as far as the page can tell. */
  get fault() {
    if (!this.file) return "Choose a picture first.";
    return this.file.size > MAX_BYTES ? "The picture is larger than 24 MiB. Choose a smaller one." : "";
  }

  #show() {
    if (this.preview.src) URL.revokeObjectURL(this.preview.src);
    this.preview.hidden = this.clear.hidden = !this.file;
    if (this.file) this.preview.src = URL.createObjectURL(this.file);
    else this.preview.removeAttribute("src");
    this.note.textContent = this.file ? this.file.name : "Choose, drop or paste a picture";
    this.showError("");
  }
}
