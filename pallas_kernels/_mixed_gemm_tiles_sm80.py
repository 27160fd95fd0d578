import dataclasses
from qjax.wgmma_layout import BLOCK

@dataclasses.dataclass(frozen=True)
class TileConfig:
    columns: int
    blocks: int
    depth: int
    stages: int
    splits: int = 1

    @property
    def rows(self) -> int:
        return BLOCK * self.blocks
