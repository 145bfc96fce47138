"""Write openfhe_vectors.npz: a secret key and a ciphertext of OpenFHE, as it holds them.

    python3.10 -m pip install openfhe==1.6.1.0.22.4 numpy && python3.10 tests/data/openfhe_vectors.py

The parameters are far from secure: 58 bits of moduli that fit 32-bit words.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import openfhe as fhe

N = 4096


def main() -> None:
    parameters = fhe.CCParamsCKKSRNS()
    parameters.SetRingDim(N)
    parameters.SetBatchSize(N // 2)
    parameters.SetMultiplicativeDepth(1)
    parameters.SetFirstModSize(30)
    parameters.SetScalingModSize(28)
    parameters.SetScalingTechnique(fhe.ScalingTechnique.FIXEDMANUAL)
    parameters.SetSecurityLevel(fhe.SecurityLevel.HEStd_NotSet)
    context = fhe.GenCryptoContext(parameters)
    context.Enable(fhe.PKESchemeFeature.PKE)
    keys = context.KeyGen()
    values = np.linspace(-1, 1, N // 2)
    plaintext = context.MakeCKKSPackedPlaintext(list(values))
    ciphertext = context.Encrypt(keys.publicKey, plaintext)

    (secret,) = polynomials(keys.secretKey)
    limbs = [limb["v"]["ptr_wrapper"]["data"] for limb in secret]
    roots = {}
    for field in fields(json.loads(fhe.Serialize(keys.secretKey, fhe.JSON)), "p"):
        for limb in field if isinstance(field, list) else []:
            data = limb["ptr_wrapper"]["data"]["value0"]
            roots[data["cm"]["v"]] = data["ru"]["v"]
    moduli = [limb["m"]["v"] for limb in limbs]
    np.savez_compressed(
        Path(__file__).with_suffix(".npz"),
        moduli=np.array(moduli, np.uint32),
        roots=np.array([roots[q] for q in moduli], np.uint32),
        secret=evaluations(secret),
        ciphertext=np.stack([evaluations(part) for part in polynomials(ciphertext)]),
        values=values,
        scale=plaintext.GetScalingFactor(),
    )


def polynomials(held: Any) -> list[list[Any]]:
    """The limbs of each polynomial that an object of OpenFHE holds."""
    found = fields(json.loads(fhe.Serialize(held, fhe.JSON)), "v")
    return [
        v for v in found if isinstance(v, list) and isinstance(v[0], dict) and isinstance(v[0]["v"], dict)
    ]


def fields(tree: Any, name: str) -> list[Any]:
    if isinstance(tree, list):
        return [f for item in tree for f in fields(item, name)]
    if not isinstance(tree, dict):
        return []
    return [f for key, value in tree.items() for f in ([value] if key == name else []) + fields(value, name)]


def evaluations(limbs: list[Any]) -> np.ndarray:
    return np.array([limb["v"]["ptr_wrapper"]["data"]["v"] for limb in limbs], np.uint32)


if __name__ == "__main__":
    main()
