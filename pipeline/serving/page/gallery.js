// The gallery: a card per video, in the order of `Videos`, changed in place.

import { service, videoPath } from "./api.js";
import { byId, create, notify } from "./dom.js";
import { duration, size } from "./format.js";
import { hasEnded } from "./videos.js";

const BADGES = { queued: "Queued", in_progress: "", completed: null, failed: "Failed", cancelled: "Cancelled" };

export class Gallery {
  #cards = new Map();
  #selected = null;

  /** select: called with the video of a card that is chosen. */
  constructor(videos, select) {
    this.videos = videos;
    this.list = byId("cards");
    this.list.addEventListener("click", (event) => {
      const card = event.target.closest("button");
      if (card) select(videos.get(card.dataset.id));
    });
    byId("load-more").addEventListener("click", () => this.#loadMore());
    videos.addEventListener("added", ({ detail }) => this.#add(detail.video, detail.before));
    videos.addEventListener("changed", ({ detail }) => this.#show(detail.video));
    videos.addEventListener("removed", ({ detail }) => this.#remove(detail.id));
    videos.addEventListener("cleared", () => this.#clear());
    videos.addEventListener("listed", () => this.#note());
    service.addEventListener("restored", () => this.#reload());
  }

  mark(id) {
    this.#cards.get(this.#selected)?.firstChild.removeAttribute("aria-current");
    this.#cards.get(id)?.firstChild.setAttribute("aria-current", "true");
    this.#selected = id;
  }

  #add(video, before) {
    const card = create("button", { type: "button", className: "card" });
    card.dataset.id = video.id;
    const item = create("li", {}, card);
    this.#cards.set(video.id, item);
    this.list.insertBefore(item, this.#cards.get(before) ?? null);
    this.#show(video);
    if (video.id === this.#selected) this.mark(video.id);
    byId("no-videos").hidden = true;
  }

  #show(video) {
    const card = this.#cards.get(video.id).firstChild;
    const percent = `${video.progress} %`;
    if (card.dataset.status !== video.status) {
      card.dataset.status = video.status;
      card.replaceChildren(
        create("span", { className: "thumbnail" }, this.#picture(video)),
        create("span", { className: "card-prompt" }, video.prompt),
        create("span", { className: "card-facts" }, `${duration(video.num_frames, video.fps)} · ${size(video.size)}`),
      );
    }
    if (video.status === "in_progress") card.querySelector(".badge").textContent = percent;
  }

  #picture(video) {
    if (video.status !== "completed") return create("span", { className: "badge" }, BADGES[video.status]);
    return create("img", {
      loading: "lazy", // before its source
      decoding: "async",
      alt: "",
      src: videoPath(video.id, "/content?variant=thumbnail"),
      onerror: () => this.videos.refresh(video.id), // deleted elsewhere?
    });
  }

  /** Load the pictures again that a lost connection has cut off. */
  #reload() {
    for (const image of this.list.querySelectorAll("img")) {
      if (image.complete && !image.naturalWidth) image.src = image.getAttribute("src");
    }
  }

  #remove(id) {
    const item = this.#cards.get(id);
    const next = item.nextSibling ?? item.previousSibling;
    const hadFocus = item.contains(document.activeElement);
    item.remove();
    this.#cards.delete(id);
    if (hadFocus) (next?.firstChild ?? byId("videos")).focus();
    this.#note();
  }

  #clear() {
    this.#cards.clear();
    this.list.replaceChildren();
  }

  #note() {
    byId("no-videos").hidden = !this.videos.isEmpty;
    byId("load-more").hidden = !this.videos.hasMore;
  }

  async #loadMore() {
    const button = byId("load-more");
    const last = this.list.lastChild;
    button.disabled = true;
    await this.videos.loadMore().catch((error) => notify(error.message, { isError: true }));
    button.disabled = false;
    if (button.hidden) (last?.nextSibling ?? this.list.lastChild)?.firstChild.focus(); // the button had the focus
  }
}
