// Values as people read them: durations, sizes, names, settings.

export const nameOf = (field) => {
  const words = field.replaceAll("_", " ");
  return words[0].toUpperCase() + words.slice(1);
};

export const size = (text) => text.replace("x", " × ");

export const seconds = (numFrames, fps) => Number(((numFrames - 1) / fps).toPrecision(3));

export const duration = (numFrames, fps) => (numFrames === 1 ? "Still" : `${seconds(numFrames, fps)} s`);

export function elapsed(total) {
  const whole = Math.max(0, Math.round(total));
  if (whole < 60) return `${whole} s`;
  const rest = String(whole % 60).padStart(2, "0");
  return whole < 3600 ? `${Math.floor(whole / 60)} min ${rest} s` : `${(whole / 3600).toFixed(1)} h`;
}

export function valueOf(field, video) {
  const given = video[field];
  if (field === "seed") return video.seed_text;
  if (field === "size") return size(given);
  if (field === "num_frames") return `${duration(given, video.fps)} (${given} frames)`;
  if (typeof given === "boolean") return given ? "Yes" : "No";
  return Array.isArray(given) ? given.join(", ") : String(given);
}

/** The settings of a video as JSON with the exact seed, which a number in JavaScript cannot hold. */
export function settingsJson(video, names) {
  const settings = Object.fromEntries(names.map((name) => [name, video[name]]));
  delete settings.seed;
  return JSON.stringify(settings, null, 2).replace(/\n\}$/, `,\n  "seed": ${BigInt(video.seed_text)}\n}`);
}
