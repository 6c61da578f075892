"""Decoders: UPerNet against an independent one, those of segmentation_models_pytorch, the light."""

import pytest
import torch
from torch import nn

from models import VisionMamba
from models.build import ModelSpec, build_model
from models.segmentation import DECODERS, as_segmenter, make_head
from models.upernet import POOL_SCALES, ConvModule, UPerHead

smp = pytest.importorskip("segmentation_models_pytorch", reason="needs segmentation-models-pytorch")
DIM, CHANNELS, CLASSES = 24, 16, 5


def small(**sizes) -> VisionMamba:
    kwargs = dict(embed_dim=DIM, depth=4, class_token=False) | sizes
    return build_model(ModelSpec("vim_micro", kwargs=kwargs, img_size=64), 0)


def test_upernet_against_an_independent_one():
    """The same weights in smp's decoder, without its norms of the maps, give the same logits."""
    torch.manual_seed(0)
    ours = UPerHead(DIM, CHANNELS, CLASSES, dropout=0.0)
    theirs = smp.decoders.upernet.decoder.UPerNetDecoder(
        [3, 0, DIM, DIM, DIM, DIM], decoder_channels=CHANNELS
    )
    theirs.feature_norms = nn.ModuleList(nn.Identity() for _ in theirs.feature_norms)

    def take(ours: ConvModule, theirs: nn.Sequential) -> None:
        nn.init.normal_(ours.bn.weight)
        nn.init.normal_(ours.bn.bias)
        theirs[0].load_state_dict(ours.conv.state_dict())
        theirs[1].load_state_dict(ours.bn.state_dict())

    for block, module in zip(theirs.psp.blocks, ours.psp_modules, strict=True):
        take(module[1], block[1])
    take(ours.bottleneck, theirs.psp.out_conv)
    for i in range(3):
        take(ours.lateral_convs[i], theirs.fpn_lateral_blocks[2 - i].conv_norm_relu)
        take(ours.fpn_convs[i], theirs.fpn_conv_blocks[2 - i])
    take(ours.fpn_bottleneck, theirs.fusion_block)
    maps = [torch.randn(2, DIM, 24 // s, 32 // s) for s in (1, 2, 4, 8)]
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        features = [torch.zeros(1), torch.zeros(1), *maps]
        torch.testing.assert_close(ours(maps), ours.conv_seg(theirs(features)))
    assert [block[0].output_size for block in theirs.psp.blocks] == list(POOL_SCALES)


@pytest.mark.parametrize("patch_size", [4, 8, 16])
@pytest.mark.parametrize("decoder", [*DECODERS, "smp:fpn", "smp:unet", "smp:segformer"])
def test_decoders_train_on_maps_of_any_patch(decoder, patch_size):
    torch.manual_seed(0)
    model = small(patch_size=patch_size)
    as_segmenter(model, make_head(decoder, model, CLASSES), CLASSES).train()
    result = model(torch.randn(2, 3, 64, 64))
    assert result.logits.shape[:2] == result.aux_logits.shape[:2] == (2, CLASSES)
    assert result.logits.shape[-1] >= 16
    (result.logits.square().mean() + result.aux_logits.square().mean()).backward()
    used = [p for p in model.head.parameters() if p.grad is not None]
    assert len(used) == len(list(model.head.parameters()))
    assert model.patch_embed.proj.weight.grad.any()


def test_what_a_decoder_does_not_take():
    model = small(patch_size=8)
    for decoder, words in (
        ("smp:deeplabv3", "smp:deeplabv3 does not take these maps: .*stride"),
        ("smp:nothing", "smp has no 'nothing'; it has .*unet"),
        ("nothing", "decoder 'nothing' is unknown; known: upernet, light, smp:NAME"),
    ):
        with pytest.raises(ValueError, match=words):
            make_head(decoder, model, CLASSES)
    with pytest.raises(ValueError, match="a width of its own"):
        make_head("smp:unet", model, CLASSES, channels=8)
