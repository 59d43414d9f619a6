"""What an hour of a device costs: list prices, each with its source and the date it was read.

They change without notice, differ by region, and are not what a contract says: `--price` replaces them.  The prices of
AWS and Google are from the catalogue that SkyPilot keeps from the providers' own interfaces
(github.com/skypilot-org/skypilot-catalog, at the commit named), read in November 2026; the catalogue's commit may be
months older.  Spot prices move by the hour and are the middle of the zones of that region at that commit.
"""

from __future__ import annotations

from typing import NamedTuple

AWS = "skypilot-catalog@00148f2 catalogs/v8/aws/vms.csv"
GOOGLE = "skypilot-catalog@006059e catalogs/v8/gcp/vms.csv"
LAMBDA = "skypilot-catalog@0f40703 catalogs/v8/lambda/vms.csv"
READ = "2026-11"


class Price(NamedTuple):
    usd: float  # per device and hour, on demand
    spot_usd: float | None
    what: str  # machine and region
    source: str
    read: str  # when


# The first of a target is what an estimate uses.  A machine of 8 is divided by 8.
PRICES: dict[str, tuple[Price, ...]] = {
    "a100-40g": (Price(21.957642 / 8, 8.1203 / 8, "AWS p4d.24xlarge, us-east-1", AWS, READ),),
    "a100-80g": (
        Price(27.44705 / 8, 9.9734 / 8, "AWS p4de.24xlarge, us-east-1", AWS, READ),
        Price(22.32 / 8, None, "Lambda gpu_8x_a100_80gb_sxm4", LAMBDA, READ),
    ),
    "h100": (
        Price(55.04 / 8, 20.2038 / 8, "AWS p5.48xlarge, us-east-1", AWS, READ),
        Price(31.92 / 8, None, "Lambda gpu_8x_h100_sxm5", LAMBDA, READ),
    ),
    "h200": (Price(63.296 / 8, 17.2074 / 8, "AWS p5en.48xlarge, us-east-1", AWS, READ),),
    "v4": (
        Price(
            3.22,
            None,
            "Google Cloud TPU v4, us-central2",
            "https://cloud.google.com/tpu/pricing: list price as remembered, not read; check before use",
            "2024",
        ),
    ),
    "v5e": (Price(307.2 / 256, 62.70106 / 256, "Google Cloud tpu-v5litepod, us-central1", GOOGLE, READ),),
    "v5p": (Price(16.8 / 4, 3.3428 / 4, "Google Cloud tpu-v5p, us-central1", GOOGLE, READ),),
    "v6e": (Price(691.2 / 256, 139.31725 / 256, "Google Cloud tpu-v6e, us-central1", GOOGLE, READ),),
}


def of(target: str) -> Price:
    """The price that an estimate for the target uses unless it is given one."""
    return PRICES[target.partition(":")[0]][0]
