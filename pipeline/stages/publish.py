"""Publish: a row's files to storage, under names that carry their content; what goes on is metadata only."""

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime

from pipeline.media.provenance import Signing
from pipeline.request import UNTOLD
from pipeline.rows import Item, as_bytes
from pipeline.stages import FILE, PUBLISH, THUMBNAIL
from pipeline.stages.stage import Stage
from pipeline.storage.storage import Storage


class Publish(Stage):
    """Writes videos/<first 2 of id>/<id>-<8 of sha256>.mp4 and its thumbnail strip, and drops the tensors.

    Stills are written to images/ instead, with the ending of their format. signing: of all of them, None = of none.
    """

    name = PUBLISH

    def __init__(self, output: str, node: str, signing: Signing | None = None) -> None:
        self.storage, self.node, self.signing = Storage(output), node, signing
        if signing:
            signing.check()  # a worker that cannot sign loses no row

    def process(self, items: Sequence[Item]) -> list[Item]:
        """Publish the rows one after another; each file is written whole or not at all."""
        return [self._published(item) for item in items]

    def _published(self, item: Item) -> Item:
        data, thumbnail = as_bytes(item.tensors[FILE]), as_bytes(item.tensors[THUMBNAIL])
        media_type = item.request.media_type
        if self.signing:
            request = item.request.model_dump(mode="json", exclude_none=True, exclude=UNTOLD)
            data = self.signing.signed(data, media_type, item.row.id, request)
        sha256 = hashlib.sha256(data).hexdigest()
        name = f"{item.row.id[:2]}/{item.row.id}-{sha256[:8]}"
        kind, _, ending = media_type.partition("/")
        uri = f"{kind}s/{name}.{ending}"
        self.storage.put(f"thumbnails/{name}.webp", thumbnail)
        self.storage.put(uri, data)
        return item.with_tensors(
            {},
            uri=uri,
            thumbnail_uri=f"thumbnails/{name}.webp",
            media_type=media_type,
            bytes=len(data),
            sha256=sha256,
            signed=self.signing is not None,
            node=self.node,
            finished_at=datetime.now(UTC),
        )
