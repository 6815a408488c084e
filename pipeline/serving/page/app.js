// The page: connects the session, the form, the player and the gallery.

import { call, service } from "./api.js";
import { byId, notify } from "./dom.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { Player } from "./player.js";
import { startSession } from "./session.js";
import { Videos } from "./videos.js";

const videos = new Videos();
const form = new Form((video) => {
  videos.put(video);
  select(video);
});
const player = new Player(videos, form);
const gallery = new Gallery(videos, (video) => select(video));

function select(video, scroll = true) {
  player.show(video);
  gallery.mark(video.id);
  videos.follow(video.id);
  if (scroll) byId("stage").scrollIntoView({ block: "nearest" });
}

/** Read what the page shows; after a sign-in, read it again. */
async function open() {
  try {
    if (!form.isBuilt) {
      const [description, models] = await Promise.all([call("GET", "openapi.json"), call("GET", "v1/models")]);
      form.build(description.answer, models.answer.data[0]);
    }
    await videos.load();
    const shown = (player.video && (await videos.refresh(player.video.id))) ?? videos.first;
    player.show(null); // loads its file again
    if (shown) select(shown, false);
  } catch (error) {
    if (error.status === 0) service.addEventListener("restored", open, { once: true });
    else if (error.status !== 401) notify(error.message, { isError: true });
  }
}

let lost = null;
service.addEventListener("lost", () => (lost = notify("Connection lost, retrying …", { shown_ms: 0 })));
service.addEventListener("restored", () => lost.remove());

startSession(open).catch((error) => {
  if (error.status === 0) service.addEventListener("restored", () => location.reload(), { once: true });
  else notify(error.message, { isError: true });
});
