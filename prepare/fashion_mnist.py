"""
FashionMNIST (Xiao et al., 1708.07747): ten kinds of clothes, made like MNIST's digits (prepare/mnist.py), in data/fashion_mnist.

    python -m prepare.fashion_mnist [--subset=t10k]
"""
import sys

from config import UserError
from prepare import mnist

if __name__ == '__main__':
    try:
        mnist.main(*sys.argv[1:], fashion=True)
    except (UserError, OSError) as error:
        sys.exit(f'error: {error}')
