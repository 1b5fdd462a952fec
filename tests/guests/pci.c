/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* PCI configuration by ports 0xcf8/0xcfc.  Firmware may not have placed BARs (qboot does not): then it is done here. */
#include "guest.h"

static u32 mmio_next = 0xe8000000, io_next = 0xc000;

static void pci_select(struct pci d, u8 reg)
{
	outl(0xcf8, 0x80000000u | d.bus << 16 | d.devfn << 8 | (reg & 0xfc));
}

u32 pci_read(struct pci d, u8 reg)
{
	pci_select(d, reg);
	return inl(0xcfc) >> (reg & 3) * 8;
}

void pci_write(struct pci d, u8 reg, u32 v)
{
	pci_select(d, reg);
	outl(0xcfc, v);
}

/* The nth device of this virtio ID on bus 0, modern or transitional. */
bool pci_find_virtio(u16 virtio_id, u32 nth, struct pci *found)
{
	for (u32 devfn = 0; devfn < 256; devfn++) {
		struct pci d = { 0, devfn };
		u32 id = pci_read(d, 0);
		u16 device = id >> 16;

		if ((id & 0xffff) != 0x1af4)
			continue;
		if (device < 0x1040)
			device = 0x1040 + (pci_read(d, 0x2e) & 0xffff);
		if (device == 0x1040 + virtio_id && nth-- == 0) {
			*found = d;
			return true;
		}
	}
	return false;
}

u64 pci_bar(struct pci d, u32 bar)
{
	u32 lo = pci_read(d, 0x10 + bar * 4);

	if ((lo & 7) == 4)
		return (lo & ~15u) | (u64)pci_read(d, 0x14 + bar * 4) << 32;
	return lo & ~15u;
}

void pci_setup(struct pci d)
{
	u32 command = pci_read(d, 4) & 0xffff;

	pci_write(d, 4, command & ~3u);
	for (u32 i = 0; i < 6; i++) {
		u8 reg = 0x10 + i * 4;
		u32 old = pci_read(d, reg), size;
		bool io = old & 1, wide = (old & 7) == 4;

		pci_write(d, reg, 0xffffffff);
		size = pci_read(d, reg);
		size = -(size & (io ? ~3u : ~15u));
		if (io)
			size &= 0xffff;
		if (!size) {
			i += wide;
			continue;
		}
		if ((old & ~15u) && !(wide && pci_read(d, reg + 4))) {
			pci_write(d, reg, old);
		} else if (io) {
			io_next = (io_next + size - 1) & -size;
			pci_write(d, reg, io_next);
			io_next += size;
		} else {
			mmio_next = (mmio_next + size - 1) & -size;
			pci_write(d, reg, mmio_next);
			if (wide)
				pci_write(d, reg + 4, 0);
			mmio_next += size;
		}
		i += wide;
	}
	pci_write(d, 4, (command | 0x406) & ~1u);	/* memory, bus master, no INTx */
}
