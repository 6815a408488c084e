// The videos that the page knows, newest first: pages of the list, and refreshing of those that are unfinished.

import { call, service, videoPath } from "./api.js";

const PAGE_LENGTH = 24;
const MIN_POLL_MS = 250; // between two requests
const RETRY_POLL_MS = 2000;
const STATUSES = ["queued", "in_progress", "completed", "failed", "cancelled"];

export const hasEnded = (video) => STATUSES.indexOf(video.status) > 1;

/** Dispatches "added" (detail: video, before: id or undefined), "changed" (video), "removed" (id), "cleared". */
export class Videos extends EventTarget {
  #known = new Map();
  #ids = []; // newest first
  #due = new Map(); // when an unfinished video is polled next, in milliseconds
  #timer;
  #source = null; // events of the video that is followed
  #followed = null;
  #isStopped = true;
  hasMore = false;

  constructor() {
    super();
    service.addEventListener("expired", () => this.#stop());
    service.addEventListener("restored", () => this.#resume());
    document.addEventListener("visibilitychange", () => this.#resume());
  }

  get(id) {
    return this.#known.get(id);
  }

  get isEmpty() {
    return this.#ids.length === 0;
  }

  /** The video to show first: the newest one that is unfinished, or else the newest one. */
  get first() {
    const videos = this.#ids.map((id) => this.get(id));
    return videos.find((video) => !hasEnded(video)) ?? videos[0] ?? null;
  }

  /** Forget everything and read the first page. */
  async load() {
    this.#stop();
    this.#known.clear();
    this.#due.clear();
    this.#ids = [];
    this.#emit("cleared");
    this.#isStopped = false;
    await this.#refreshNewest();
  }

  /** Read the next page of older videos. */
  async loadMore() {
    const last = this.#ids.at(-1);
    try {
      this.#append(await this.#page(last));
    } catch (error) {
      if (error.status !== 404) throw error;
      this.remove(last); // deleted elsewhere: continue after the video before it
      await (this.isEmpty ? this.load() : this.loadMore());
    }
  }

  /** Add a video, or update the one that is known by its id. */
  put(video, before = this.#ids[0]) {
    const old = this.get(video.id);
    if (old && hasEnded(old) && !hasEnded(video)) return; // an answer that was overtaken
    this.#known.set(video.id, video);
    if (hasEnded(video)) this.#due.delete(video.id);
    else if (!this.#due.has(video.id)) this.#due.set(video.id, performance.now() + RETRY_POLL_MS);
    if (old) {
      this.#emit("changed", { video });
    } else {
      this.#ids.splice(before ? this.#ids.indexOf(before) : this.#ids.length, 0, video.id);
      this.#emit("added", { video, before });
    }
    if (video.id === this.#followed && hasEnded(video)) this.#close();
    this.#schedule();
  }

  remove(id) {
    if (!this.#known.delete(id)) return;
    this.#due.delete(id);
    this.#ids = this.#ids.filter((other) => other !== id);
    if (id === this.#followed) this.follow(null);
    this.#emit("removed", { id });
  }

  /** Read a video; one that no longer exists is removed. Returns it, or undefined. */
  async refresh(id) {
    try {
      const { answer, headers } = await call("GET", videoPath(id));
      if (!this.get(id)) return answer; // removed meanwhile, or not listed yet
      const wait_ms = Number(headers.get("openai-poll-after-ms")) || RETRY_POLL_MS;
      if (!hasEnded(answer)) this.#due.set(id, performance.now() + wait_ms);
      this.put(answer);
      return answer;
    } catch (error) {
      if (error.status === 404) this.remove(id);
      else if (this.#due.has(id)) this.#due.set(id, performance.now() + RETRY_POLL_MS);
      return undefined;
    }
  }

  /** Receive the changes of one video as events; the other unfinished ones are polled. */
  follow(id) {
    this.#close();
    this.#followed = id;
    const video = this.get(id);
    if (!video || hasEnded(video) || document.hidden || this.#isStopped) return; // a browser has few connections
    this.#source = new EventSource(videoPath(id, "/events"));
    for (const status of STATUSES) {
      this.#source.addEventListener(`video.${status}`, (event) => this.put(JSON.parse(event.data)));
    }
    this.#source.onerror = () => {
      if (this.#source?.readyState === EventSource.CLOSED) this.#close(); // refused: it is polled from now on
      this.refresh(id); // notices a lost connection, an ended session, a deleted video
    };
  }

  #close() {
    this.#source?.close();
    this.#source = null;
    this.#schedule();
  }

  #stop() {
    this.#isStopped = true;
    clearTimeout(this.#timer);
    this.#source?.close();
    this.#source = null;
  }

  /** Catch up after a lost connection, or when the page is looked at again. */
  #resume() {
    if (this.#isStopped) return;
    this.follow(this.#followed);
    if (!document.hidden) this.#refreshNewest().catch(() => null); // the next probe or look tries again
  }

  /** Read the first page: add what is new, and remove what was deleted elsewhere. */
  async #refreshNewest() {
    const before = new Set(this.#ids);
    const page = await this.#page();
    if (this.isEmpty) return this.#append(page);
    if (page.has_more && !page.data.some((video) => this.get(video.id))) return this.load(); // a page of new ones
    const listed = new Set(page.data.map((video) => video.id));
    const end = page.has_more && this.get(page.last_id) ? this.#ids.indexOf(page.last_id) : this.#ids.length;
    for (const id of this.#ids.slice(0, end)) if (before.has(id) && !listed.has(id)) this.remove(id);
    let next = null;
    for (const video of page.data.toReversed()) {
      if (before.has(video.id) && !this.get(video.id)) continue; // removed meanwhile
      this.put(video, next);
      next = video.id;
    }
    this.#emit("listed");
  }

  async #page(after = null) {
    const query = new URLSearchParams(after ? { limit: PAGE_LENGTH, after } : { limit: PAGE_LENGTH });
    return (await call("GET", `v1/videos?${query}`)).answer;
  }

  #append(page) {
    this.hasMore = page.has_more;
    for (const video of page.data) this.put(video, null);
    this.#emit("listed");
  }

  /** Poll the unfinished videos one after another, each when it is due. */
  #schedule() {
    clearTimeout(this.#timer);
    if (this.#isStopped) return;
    const waiting = [...this.#due].filter(([id]) => !(this.#source && id === this.#followed));
    if (waiting.length === 0) return;
    const [id, due_ms] = waiting.reduce((first, other) => (other[1] < first[1] ? other : first));
    const wait_ms = Math.max(MIN_POLL_MS, due_ms - performance.now());
    this.#timer = setTimeout(async () => {
      this.#due.set(id, performance.now() + RETRY_POLL_MS); // while this one is asked for
      await this.refresh(id);
      this.#schedule();
    }, wait_ms);
  }

  #emit(type, detail = {}) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
