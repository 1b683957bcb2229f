"""The ACPI table that gives the lab host frequencies, idle states and a complete wake-up: an SSDT, as AML bytes.

QEMU describes its processors without either. This table adds to each `\\_SB.CPUS.Cnnn` that QEMU has made the objects
that Linux's acpi-cpufreq and acpi_idle look for (ACPI specification 8.4; its chapter 20 is the encoding). It must name
exactly the processors that are there: at a scope that names nothing Linux drops the table from there on.

Nothing really runs slower: the frequency is written to an I/O port where QEMU has no device.

It also has \\_WAK, which Linux calls after a suspend before it resumes devices, to do what SeaBIOS forgets.
"""

import struct

MHZ_AND_MILLIWATTS = ((2400, 30_000), (2000, 22_000), (1600, 15_000), (800, 8_000))
TRANSITION_US = 10  # the latency of a change of frequency
CONTROL_PORT, STATUS_PORT = 0x880, 0x884

# (type, exit latency in µs, power in mW). Both states are HLT. A C2 of ACPI's type 2 would be entered by reading an I/O
# port, and because QEMU's read returns at once, the idle loop would never sleep: it would keep one of our processors
# busy for each of the guest's, and make Linux distrust the TSC, which may stop in a real C2. As a second state of type
# 1 it sleeps until the next interrupt, and Linux still takes it for another state with a latency of its own.
IDLE_STATES = ((1, 1, 1000), (1, 100, 500))

# Registers of the chipset that the reset at wake-up clears: (bus 0's device and function << 8 | register, value).
# SeaBIOS would set them again, but does so through the memory-mapped configuration space, which is off until the first
# of them is set. Without it extended capabilities are out of reach, so virtual functions are lost; without the others
# ACPI's events and the power switch are.
CHIPSET = (
    (0x0060, 0xB000_0001),  # host bridge: where the memory-mapped configuration space is, and that it is on
    (0xF840, 0x601),  # ISA bridge: where ACPI's registers are
    (0xF844, 0x80),  # ISA bridge: that they are on
)
PCI_PORTS, PM1_CONTROL_PORT, SCI_ENABLE = 0xCF8, 0x604, 1

SYSTEM_IO, FIXED_HARDWARE = 1, 0x7F  # address spaces
COORDINATE_ALL = 0xFC  # _PSD: software sets the frequency, on all the processors of a domain


def package_length(size: int) -> bytes:
    """The length of something `size` bytes long, which counts the bytes of the length itself (20.2.4)."""
    if size + 1 < 1 << 6:
        return bytes([size + 1])
    for more in (1, 2, 3):
        length = size + 1 + more
        if length < 1 << (4 + 8 * more):
            return bytes([more << 6 | length & 0xF]) + (length >> 4).to_bytes(more, "little")
    raise ValueError(f"{size} bytes do not fit into one package")


def integer(value: int) -> bytes:
    if value < 2:
        return bytes([value])  # ZeroOp, OneOp
    for prefix, width in ((0x0A, 1), (0x0B, 2), (0x0C, 4)):
        if value < 1 << (8 * width):
            return bytes([prefix]) + value.to_bytes(width, "little")
    raise ValueError(f"{value} has more than 32 bits")


def package(*elements: bytes) -> bytes:
    body = bytes([len(elements)]) + b"".join(elements)
    return b"\x12" + package_length(len(body)) + body


def integers(*values: int) -> bytes:
    return package(*map(integer, values))


def register(space: int, bits: int = 0, address: int = 0) -> bytes:
    """A buffer with one Generic Register Descriptor (6.4.3.7) and the end tag, whose checksum 0 means none."""
    descriptor = struct.pack("<BHBBBBQ", 0x82, 12, space, bits, 0, 0, address) + b"\x79\0"
    body = integer(len(descriptor)) + descriptor
    return b"\x11" + package_length(len(body)) + body


def name(segment: str, value: bytes) -> bytes:
    return b"\x08" + segment.encode() + value


def scope(path: list[str], body: bytes) -> bytes:
    """`body` within the object that `path` names from the root."""
    body = b"\\\x2f" + bytes([len(path)]) + "".join(path).encode() + body
    return b"\x10" + package_length(len(body)) + body


def processor(number: int) -> bytes:
    """The objects of one processor: a frequency domain of its own, all frequencies, all idle states."""
    # A state's value for the control register and the one to expect in the status register: the ratio to 100 MHz.
    frequencies = (
        integers(mhz, power, TRANSITION_US, TRANSITION_US, mhz // 100, mhz // 100) for mhz, power in MHZ_AND_MILLIWATTS
    )
    idle = (package(register(FIXED_HARDWARE), *map(integer, state)) for state in IDLE_STATES)
    body = (
        name("_PSS", package(*frequencies)),
        name("_PCT", package(register(SYSTEM_IO, 16, CONTROL_PORT), register(SYSTEM_IO, 16, STATUS_PORT))),
        name("_PPC", integer(0)),  # the fastest state that may be used is the first
        name("_PSD", package(integers(5, 0, number, COORDINATE_ALL, 1))),
        name("_CST", package(integer(len(IDLE_STATES)), *idle)),
    )
    return scope(["_SB_", "CPUS", f"C{number:03X}"], b"".join(body))


def ports(region: str, port: int, width: int, *fields: str) -> bytes:
    """Names for adjacent I/O ports, each `width` bytes wide (2 or 4)."""
    space = b"\x5b\x80" + region.encode() + bytes([SYSTEM_IO]) + integer(port) + integer(width * len(fields))
    body = region.encode() + bytes([{2: 2, 4: 3}[width]])  # accessed as words or double words
    body += b"".join(field.encode() + bytes([8 * width]) for field in fields)
    return space + b"\x5b\x81" + package_length(len(body)) + body


def store(value: int, target: str) -> bytes:
    return b"\x70" + integer(value) + target.encode()


def wake() -> bytes:
    """The method \\_WAK and the ports it writes to."""
    body = b"_WAK\x01"  # one argument: the state it wakes from
    for register_number, value in CHIPSET:
        body += store(1 << 31 | register_number, "PCIA") + store(value, "PCID")
    body += store(SCI_ENABLE, "PM1C") + b"\xa4" + integers(0, 0)  # returns: nothing was wrong
    return (
        ports("LPCI", PCI_PORTS, 4, "PCIA", "PCID")
        + ports("LPM1", PM1_CONTROL_PORT, 2, "PM1C")
        + (b"\x14" + package_length(len(body)) + body)
    )


def table(cpus: int) -> bytes:
    """The table for a machine with exactly `cpus` processors."""
    body = b"".join(map(processor, range(cpus))) + wake()
    header = struct.Struct("<4sIBB6s8sI4sI")  # signature, length, revision, checksum, who made it and its version
    made_by = (b"OVTLAB", b"POWER\0\0\0", 1, b"OVT\0", 1)
    unsigned = header.pack(b"SSDT", header.size + len(body), 2, 0, *made_by) + body
    return header.pack(b"SSDT", len(unsigned), 2, -sum(unsigned) % 256, *made_by) + body
