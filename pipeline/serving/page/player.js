// The player: the selected video while it is queued, made and done, with its settings and actions.

import { call, now, service, videoPath } from "./api.js";
import { byId, create, notify } from "./dom.js";
import { elapsed, nameOf, settingsJson, value } from "./format.js";
import { hasEnded } from "./videos.js";

const HINT = "Your video plays here while it is made.";
const FAILED = "Select “Use settings” to try again. If it fails again, send the video ID below to the operator.";
const isCalm = matchMedia("(prefers-reduced-motion: reduce)");

export class Player {
  #file = null; // what the stage shows: an id and "stream", "content" or a status
  video = null;

  /** settings: returns the names of a video's settings; use: copies them into the form. */
  constructor(videos, { settings, labels, use }) {
    Object.assign(this, { videos, settings, labels });
    this.stage = byId("stage");
    byId("use").addEventListener("click", () => use(this.video));
    byId("copy").addEventListener("click", () => this.#copy());
    byId("cancel").addEventListener("click", () => this.#cancel());
    byId("delete").addEventListener("click", () => this.#delete());
    videos.addEventListener("changed", ({ detail }) => detail.video.id === this.video?.id && this.show(detail.video));
    videos.addEventListener("removed", ({ detail }) => this.#forget(detail.id));
    service.addEventListener("restored", () => this.#reload());
    setInterval(() => this.#tick(), 1000);
    this.show(null);
  }

  show(video) {
    const isOther = video?.id !== this.video?.id;
    this.video = video;
    byId("shown").hidden = !video;
    document.title = video && !hasEnded(video) ? `${video.progress} % · pyramid-render` : "pyramid-render";
    if (!video) return this.#place(null, this.#note(HINT));
    const state = this.#state(video);
    if (byId("state").textContent !== state) byId("state").textContent = state; // announced once
    byId("state").dataset.status = video.status;
    byId("progress").hidden = hasEnded(video);
    byId("progress").value = video.progress;
    byId("cancel").hidden = hasEnded(video);
    byId("download").hidden = video.status !== "completed";
    byId("download").href = videoPath(video.id, "/content");
    byId("advice").textContent = video.status === "failed" ? FAILED : "";
    if (isOther) this.#describe(video);
    this.#tick();
    this.#stageFor(video);
  }

  #state(video) {
    switch (video.status) {
      case "queued":
        if (!video.position) return "Next in the queue";
        return `In the queue, ${video.position} ${video.position === 1 ? "video" : "videos"} ahead`;
      case "in_progress":
        return "Making the video";
      case "completed":
        return `Finished in ${elapsed(video.completed_at - video.created_at)}`;
      case "failed":
        return `Failed: ${video.error.message}`;
      default:
        return "Cancelled";
    }
  }

  #tick() {
    const video = this.video;
    if (!video) return;
    const isGoing = !hasEnded(video);
    const since = isGoing ? elapsed(now() - video.created_at) : "";
    byId("elapsed").textContent = video.status === "in_progress" ? `${video.progress} % · ${since}` : since;
  }

  #describe(video) {
    byId("shown-prompt").textContent = video.prompt;
    const names = this.settings(video).filter((name) => name !== "prompt" && video[name] !== "");
    const facts = names.map((name) => [this.labels(name), value(name, video)]);
    facts.push(["Created", new Date(1000 * video.created_at).toLocaleString()], ["Video ID", video.id]);
    byId("facts").replaceChildren(
      ...facts.map(([name, text]) => create("div", {}, create("dt", {}, name), create("dd", {}, text))),
    );
  }

  #stageFor(video) {
    const isStill = video.num_frames === 1;
    if (video.status === "completed") {
      const source = videoPath(video.id, "/content");
      const make = () => (isStill ? create("img", { src: source, alt: video.prompt }) : this.#playing(source, true));
      return this.#place(`${video.id} content`, make);
    }
    if (video.status === "in_progress" && !isStill) {
      return this.#place(`${video.id} stream`, () => this.#playing(videoPath(video.id, "/stream"), false));
    }
    const notes = {
      queued: "The video starts as soon as it is its turn.",
      in_progress: "The picture appears here when it is done.",
      failed: "This video could not be made.",
      cancelled: "This video was cancelled.",
    };
    return this.#place(`${video.id} ${video.status}`, this.#note(notes[video.status]));
  }

  /** Put an element on the stage unless it is there; a finished video takes over where the stream was. */
  #place(file, make) {
    if (file !== null && this.#file === file) return;
    const id = this.#file?.split(" ")[0];
    const old = this.stage.querySelector("video");
    this.#file = file;
    const element = make();
    if (old?.currentTime && element.tagName === "VIDEO" && file.startsWith(`${id} `)) {
      element.autoplay &&= !old.paused || old.ended;
      element.addEventListener("loadedmetadata", () => (element.currentTime = old.currentTime), { once: true });
      element.addEventListener("seeked", () => this.#file === file && this.#swap(element), { once: true });
      element.load();
    } else {
      this.#swap(element);
    }
  }

  #swap(element) {
    const old = this.stage.querySelector("video");
    this.stage.replaceChildren(element);
    if (element.tagName === "VIDEO" && !element.readyState) {
      const note = this.#note("The first frames appear here in a moment.")();
      this.stage.append(note);
      element.addEventListener("loadeddata", () => note.remove(), { once: true });
    }
    if (old) {
      old.removeAttribute("src"); // ends its download
      old.load();
    }
  }

  #note(text) {
    return () => create("p", { className: "stage-note" }, text);
  }

  #playing(source, isWhole) {
    const video = create("video", { controls: true, muted: true, playsInline: true, preload: "auto" });
    video.setAttribute("aria-label", "Video");
    video.autoplay = !isCalm.matches;
    video.loop = isWhole && !isCalm.matches;
    video.addEventListener("error", () => video.src && this.videos.refresh(this.video?.id));
    video.src = source;
    return video;
  }

  /** Load a file again that a lost connection has cut off. */
  #reload() {
    const video = this.stage.querySelector("video");
    if (video?.error || video?.networkState === HTMLMediaElement.NETWORK_NO_SOURCE) {
      this.#file = null;
      this.show(this.video);
    }
  }

  async #copy() {
    const text = settingsJson(this.video, this.settings(this.video));
    try {
      await navigator.clipboard.writeText(text);
    } catch { // no permission, or http
      const area = create("textarea", { value: text, className: "hidden-label" });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
      byId("copy").focus();
    }
    notify("Settings copied as JSON.");
  }

  #cancel() {
    const { id } = this.video;
    return this.#act(id, async () => this.videos.put((await call("POST", videoPath(id, "/cancel"))).answer));
  }

  async #delete() {
    const { id, prompt } = this.video;
    const dialog = byId("confirm");
    byId("confirm-text").textContent = `“${prompt}” and its files are removed for good.`;
    dialog.returnValue = "keep";
    dialog.showModal();
    await new Promise((done) => dialog.addEventListener("close", done, { once: true }));
    if (dialog.returnValue !== "delete") return;
    await this.#act(id, async () => {
      await call("DELETE", videoPath(id));
      this.#forget(id, "Video deleted.");
      this.videos.remove(id);
      byId("videos").focus({ preventScroll: true });
    });
  }

  async #act(id, action) {
    try {
      await action();
    } catch (error) {
      if (error.status === 404) this.videos.remove(id);
      else if (error.status !== 401) notify(error.message, { isError: true });
    }
  }

  #forget(id, message = "This video no longer exists: it was deleted, or its time was over.") {
    if (id !== this.video?.id) return;
    byId("confirm").close();
    this.show(null);
    notify(message);
  }
}
