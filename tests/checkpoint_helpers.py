"""What the tests of checkpoints use: the smallest model of ours, and files of others, whole and not."""
import torch

NAME = 'test_resnet_softpool'


def as_data_parallel(tensors):
    return {'epoch': 90, 'state_dict': {f'module.{name}': value for name, value in tensors.items()}}


def truncated(content):
    return content[:len(content) // 2]


def saved(value, folder):
    torch.save(value, folder / 'saved')
    return (folder / 'saved').read_bytes()
