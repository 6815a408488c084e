// The player: the selected video while it waits, while it is made and when it is done, with settings and actions.

import { call, now, service, videoPath } from "./api.js";
import { byId, create, notify } from "./dom.js";
import { elapsed, settingsJson, valueOf } from "./format.js";
import { hasEnded } from "./videos.js";

const HINT = "Your video plays here while it is made.";
const NOTES = {
  queued: "The video starts when it is its turn.",
  in_progress: "The picture appears here when it is done.",
  failed: "This video could not be made.",
  cancelled: "This video was cancelled.",
};
const ADVICE = "Select “Use settings” to try again. If it fails again, send the video ID below to the operator.";
const GONE = "This video no longer exists: it was deleted, or its time was over.";
const isCalm = matchMedia("(prefers-reduced-motion: reduce)");

const STATES = {
  queued: ({ position }) =>
    position ? `In the queue, ${position} ${position === 1 ? "video" : "videos"} ahead` : "Next in the queue",
  in_progress: () => "Making the video",
  completed: (video) => `Finished in ${elapsed(video.completed_at - video.created_at)}`,
  failed: ({ error }) => `Failed: ${error.message}`,
  cancelled: () => "Cancelled",
};

export class Player {
  #staged = null; // what is on the stage: a video's id and the file, or its status
  video = null;

  /** form: names and labels the settings of a video, and takes them over. */
  constructor(videos, form) {
    Object.assign(this, { videos, form, stage: byId("stage") });
    byId("use").addEventListener("click", () => form.use(this.video));
    byId("copy").addEventListener("click", () => this.#copy());
    byId("cancel").addEventListener("click", () => this.#cancel());
    byId("delete").addEventListener("click", () => this.#delete());
    videos.addEventListener("changed", ({ detail }) => detail.video.id === this.video?.id && this.show(detail.video));
    videos.addEventListener("removed", ({ detail }) => this.#forget(detail.id, GONE));
    service.addEventListener("restored", () => this.#reload());
    setInterval(() => this.#tick(), 1000);
    this.show(null);
  }

  show(video) {
    const isOther = video?.id !== this.video?.id;
    this.video = video;
    byId("shown").hidden = !video;
    document.title = video && !hasEnded(video) ? `${video.progress} % · pyramid-render` : "pyramid-render";
    if (!video) return this.#put(null, () => create("p", {}, HINT));
    const state = byId("state");
    const text = STATES[video.status](video);
    if (state.textContent !== text) state.textContent = text; // is announced once
    state.dataset.status = video.status;
    byId("progress").hidden = byId("cancel").hidden = hasEnded(video);
    byId("progress").value = video.progress;
    byId("download").hidden = video.status !== "completed";
    byId("download").href = videoPath(video.id, "/content");
    byId("advice").textContent = video.status === "failed" ? ADVICE : "";
    if (isOther) this.#describe(video);
    this.#tick();
    this.#fill(video);
  }

  #tick() {
    const { video } = this;
    if (!video) return;
    const text = hasEnded(video) ? "" : elapsed(now() - video.created_at);
    byId("elapsed").textContent = video.status === "in_progress" ? `${video.progress} % · ${text}` : text;
  }

  #describe(video) {
    byId("shown-prompt").textContent = video.prompt;
    const names = this.form.settings(video).filter((name) => video[name] !== "");
    const facts = names.map((name) => [this.form.label(name), valueOf(name, video)]);
    facts.push(["Created", new Date(1000 * video.created_at).toLocaleString()], ["Video ID", video.id]);
    const lines = facts.map(([name, text]) => create("div", {}, create("dt", {}, name), create("dd", {}, text)));
    byId("facts").replaceChildren(...lines);
  }

  /** Bring to the stage what there is of a video. */
  #fill({ id, status, num_frames, prompt }) {
    const isStill = num_frames === 1;
    const file = status === "completed" ? "content" : status === "in_progress" && !isStill ? "stream" : null;
    const source = videoPath(id, `/${file}`);
    if (!file) this.#put(`${id} ${status}`, () => create("p", {}, NOTES[status]));
    else if (isStill) this.#put(`${id} ${file}`, () => create("img", { src: source, alt: prompt }));
    else this.#put(`${id} ${file}`, () => this.#play(source, file === "content"));
  }

  /** Put an element on the stage unless it is there; a finished video takes over where its stream is. */
  #put(staged, make) {
    if (staged && this.#staged === staged) return;
    const isSame = staged?.split(" ")[0] === this.#staged?.split(" ")[0];
    const old = this.stage.querySelector("video");
    const element = make();
    this.#staged = staged;
    if (isSame && old?.currentTime && element.tagName === "VIDEO") {
      const isPaused = old.paused && !old.ended;
      element.addEventListener("loadedmetadata", () => (element.currentTime = old.currentTime), { once: true });
      const take = () => this.#staged === staged && this.#swap(element, old, isPaused);
      element.addEventListener("seeked", take, { once: true });
    } else {
      this.#swap(element, old);
    }
  }

  #swap(element, old, isPaused = isCalm.matches) {
    this.stage.replaceChildren(element);
    if (element.tagName === "VIDEO") {
      if (!isPaused) element.play().catch(() => null); // `autoplay` waits for more of a stream
      if (!element.readyState) {
        const note = this.stage.appendChild(create("p", {}, "The first frames appear here in a moment."));
        element.addEventListener("loadeddata", () => note.remove(), { once: true });
      }
    }
    old?.removeAttribute("src"); // ends its download
    old?.load();
  }

  #play(source, isWhole) {
    const options = { controls: true, muted: true, playsInline: true, loop: isWhole && !isCalm.matches };
    const video = create("video", { ...options, "aria-label": "Video", src: source });
    video.addEventListener("error", () => video.src && this.videos.refresh(this.video?.id)); // deleted elsewhere?
    return video;
  }

  /** Load a file again that a lost connection has cut off. */
  #reload() {
    if (!this.stage.querySelector("video")?.error) return;
    this.#staged = null;
    this.show(this.video);
  }

  async #copy() {
    try {
      await navigator.clipboard.writeText(settingsJson(this.video, this.form.settings(this.video)));
      notify("Settings copied as JSON.");
    } catch {
      notify("The browser does not allow copying here. Open “Settings of this video”.", { isError: true });
    }
  }

  #cancel() {
    const { id } = this.video;
    return this.#act(id, async () => this.videos.put((await call("POST", videoPath(id, "/cancel"))).answer));
  }

  async #delete() {
    const { id, prompt } = this.video;
    const dialog = byId("confirm");
    const name = prompt.length > 100 ? `${prompt.slice(0, 100)}…` : prompt;
    byId("confirm-text").textContent = `“${name}” and its files are removed for good.`;
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

  #forget(id, message) {
    if (id !== this.video?.id) return;
    byId("confirm").close();
    this.show(null);
    notify(message);
  }
}
