/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Modern virtio devices and split queues, polled, for any device (virtio 1.2, chapters 2.7, 4.1 and 4.2).  Knows no device type.
 * They are looked for on PCI, or where the command line names any, at the addresses that it says.
 */
#include "guest.h"

/* The registers that both transports have: in struct virtio_pci_common_cfg, and of virtio-mmio, where each has 32 bits. */
enum { DF_SELECT, DF, GF_SELECT, GF, STATUS, Q_SELECT, Q_MAX, Q_SIZE, Q_ENABLE, Q_DESC, Q_AVAIL, Q_USED };
static const struct { u8 pci, pci_bytes, mmio; } registers[] = {
	[DF_SELECT] = { 0, 4, 0x14 }, [DF] = { 4, 4, 0x10 }, [GF_SELECT] = { 8, 4, 0x24 }, [GF] = { 12, 4, 0x20 },
	[STATUS] = { 20, 1, 0x70 }, [Q_SELECT] = { 22, 2, 0x30 }, [Q_MAX] = { 24, 2, 0x34 }, [Q_SIZE] = { 24, 2, 0x38 },
	[Q_ENABLE] = { 28, 2, 0x44 }, [Q_DESC] = { 32, 4, 0x80 }, [Q_AVAIL] = { 40, 4, 0x90 }, [Q_USED] = { 48, 4, 0xa0 },
};
enum { PCI_Q_MSIX = 26, PCI_Q_NOTIFY = 30 };
enum { MMIO_MAGIC = 0, MMIO_VERSION = 4, MMIO_DEVICE_ID = 8, MMIO_Q_NOTIFY = 0x50, MMIO_CONFIG = 0x100 };

#define R8(v, o)	(*(volatile u8 *)((v)->common + (o)))
#define R16(v, o)	(*(volatile u16 *)((v)->common + (o)))
#define R32(v, o)	(*(volatile u32 *)((v)->common + (o)))

static u32 get(struct vdev *v, u32 reg)
{
	u32 at = registers[reg].pci, bytes = registers[reg].pci_bytes;

	if (v->mmio)
		return R32(v, registers[reg].mmio);
	return bytes == 4 ? R32(v, at) : bytes == 2 ? R16(v, at) : R8(v, at);
}

static void set(struct vdev *v, u32 reg, u32 value)
{
	u32 at = registers[reg].pci, bytes = registers[reg].pci_bytes;

	if (v->mmio)
		R32(v, registers[reg].mmio) = value;
	else if (bytes == 4)
		R32(v, at) = value;
	else if (bytes == 2)
		R16(v, at) = value;
	else
		R8(v, at) = value;
}

/* Both have the upper half behind the lower one. */
static void set_address(struct vdev *v, u32 reg, volatile void *p)
{
	set(v, reg, (u64)p);
	R32(v, (v->mmio ? registers[reg].mmio : registers[reg].pci) + 4) = (u64)p >> 32;
}

/* The nth of those that the command line names. */
static bool mmio_find(struct vdev *v, u16 virtio_id, u32 nth)
{
	u64 at, size;

	for (u32 i = 0; opt_mmio(i, &at, &size); i++) {
		*v = (struct vdev) {
			.mmio = true, .common = (u8 *)at, .config = (u8 *)at + MMIO_CONFIG, .config_len = size - MMIO_CONFIG,
		};
		if (size <= MMIO_CONFIG || at + size > 1ull << 32)
			fail("virtio_mmio.device: %lu bytes at 0x%lx", size, at);
		if (R32(v, MMIO_MAGIC) != 0x74726976 || R32(v, MMIO_VERSION) != 2)
			fail("0x%lx is no virtio-mmio device of version 2: 0x%x, %u", at, R32(v, MMIO_MAGIC), R32(v, MMIO_VERSION));
		if (R32(v, MMIO_DEVICE_ID) == virtio_id && nth-- == 0)
			return true;
	}
	memset(v, 0, sizeof(*v));
	return false;
}

bool vdev_find(struct vdev *v, u16 virtio_id, u32 nth)
{
	if (machine_mmio())
		return mmio_find(v, virtio_id, nth);
	memset(v, 0, sizeof(*v));
	if (!pci_find_virtio(virtio_id, nth, &v->pci))
		return false;
	pci_setup(v->pci);
	for (u8 cap = pci_read(v->pci, 0x34); cap; cap = pci_read(v->pci, cap + 1)) {
		u32 type = pci_read(v->pci, cap + 3) & 0xff;
		u8 *at;

		if ((pci_read(v->pci, cap) & 0xff) != 9 || type < 1 || type > 4)
			continue;
		at = (u8 *)pci_bar(v->pci, pci_read(v->pci, cap + 4) & 0xff) + pci_read(v->pci, cap + 8);
		if (type == 1 && !v->common)
			v->common = at;
		if (type == 2 && !v->notify_base) {
			v->notify_base = at;
			v->notify_mult = pci_read(v->pci, cap + 16);
		}
		if (type == 4 && !v->config) {
			v->config = at;
			v->config_len = pci_read(v->pci, cap + 12);
		}
	}
	if (!v->common || !v->notify_base)
		fail("virtio device %u has no modern capabilities", virtio_id);
	return true;
}

void vdev_reset(struct vdev *v)
{
	set(v, STATUS, 0);
	for (u64 t = now_ns(); get(v, STATUS); relax())
		if (now_ns() - t > 10000000000ull)
			fail("device does not finish its reset");
}

bool vdev_negotiate(struct vdev *v, u64 wanted)
{
	set(v, STATUS, 1);
	set(v, STATUS, 3);
	set(v, DF_SELECT, 0);
	v->offered = get(v, DF);
	set(v, DF_SELECT, 1);
	v->offered |= (u64)get(v, DF) << 32;
	v->features = v->offered & wanted;
	set(v, GF_SELECT, 0);
	set(v, GF, v->features);
	set(v, GF_SELECT, 1);
	set(v, GF, v->features >> 32);
	set(v, STATUS, 11);
	return get(v, STATUS) & 8;
}

void vq_setup(struct vq *q, struct vdev *v, u16 index, void *used_page)
{
	u8 *page = alloc_page();

	*q = (struct vq) { .dev = v, .index = index };
	memset(page, 0, PAGE);
	set(v, Q_SELECT, index);
	q->size = MIN(get(v, Q_MAX), QMAX);
	if (!q->size)
		fail("virtio queue %u does not exist", index);
	q->n_free = q->size;
	q->desc = (struct desc *)page;
	q->avail = (struct avail *)(page + 2048);
	q->used = used_page ? used_page : alloc_page();
	if (!used_page)
		memset((void *)q->used, 0, PAGE);
	q->last_used = q->used->idx;
	for (u32 i = 0; i < q->size; i++)
		q->desc[i].next = i + 1;
	q->avail->flags = 1;		/* no interrupts */
	vq_announce(q);
}

void vq_announce(struct vq *q)
{
	struct vdev *v = q->dev;

	set(v, Q_SELECT, q->index);
	set(v, Q_SIZE, q->size);
	set_address(v, Q_DESC, q->desc);
	set_address(v, Q_AVAIL, q->avail);
	set_address(v, Q_USED, q->used);
	if (v->mmio) {
		q->notify = v->common + MMIO_Q_NOTIFY;
	} else {
		R16(v, PCI_Q_MSIX) = 0xffff;
		q->notify = v->notify_base + R16(v, PCI_Q_NOTIFY) * v->notify_mult;
	}
	set(v, Q_ENABLE, 1);
}

void vdev_ok(struct vdev *v)
{
	set(v, STATUS, 15);
}

u8 vdev_status(struct vdev *v)
{
	return get(v, STATUS);
}

u64 vdev_config(struct vdev *v, u32 offset, u32 size)
{
	volatile u8 *p = v->config + offset;

	if (size == 8)
		return *(volatile u32 *)p | (u64)*(volatile u32 *)(p + 4) << 32;
	return size == 4 ? *(volatile u32 *)p : size == 2 ? *(volatile u16 *)p : *p;
}

static u16 take(struct vq *q)
{
	u16 d = q->free_head;

	q->free_head = q->desc[d].next;
	q->n_free--;
	return d;
}

int vq_publish(struct vq *q, int head)
{
	if (head < 0)
		return head;
	q->inflight |= 1ull << head;
	q->avail->ring[q->avail->idx % q->size] = head;
	mb();
	WRITE_ONCE(q->avail->idx, q->avail->idx + 1);
	return head;
}

int vq_prepare(struct vq *q, const struct sg *sg, u32 n)
{
	u16 head = 0, last = 0;

	if (!n || n > q->n_free)
		return -1;
	for (u32 i = 0; i < n; i++) {
		u16 d = take(q);

		if (i)
			q->desc[last].next = d;
		else
			head = d;
		q->desc[d] = (struct desc) {
			sg[i].addr, sg[i].len, (sg[i].write ? DESC_WRITE : 0) | (i + 1 < n ? DESC_NEXT : 0), q->desc[d].next,
		};
		last = d;
	}
	return head;
}

int vq_prepare_indirect(struct vq *q, struct desc *table, const struct sg *sg, u32 n)
{
	u16 d;

	if (!q->n_free)
		return -1;
	for (u32 i = 0; i < n; i++)
		table[i] = (struct desc) {
			sg[i].addr, sg[i].len, (sg[i].write ? DESC_WRITE : 0) | (i + 1 < n ? DESC_NEXT : 0), i + 1 < n ? i + 1 : 0,
		};
	d = take(q);
	q->desc[d] = (struct desc) { (u64)table, n * sizeof(*table), DESC_INDIRECT, q->desc[d].next };
	return d;
}

int vq_add(struct vq *q, const struct sg *sg, u32 n)
{
	return vq_publish(q, vq_prepare(q, sg, n));
}

int vq_add_indirect(struct vq *q, struct desc *table, const struct sg *sg, u32 n)
{
	return vq_publish(q, vq_prepare_indirect(q, table, sg, n));
}

void vq_kick(struct vq *q)
{
	mb();
	if (q->dev->mmio)
		*(volatile u32 *)q->notify = q->index;
	else
		*(volatile u16 *)q->notify = q->index;
}

bool vq_pop(struct vq *q, u32 *head, u32 *len)
{
	u32 d;

	if (q->used->idx == q->last_used)
		return false;
	mb();
	*head = q->used->ring[q->last_used % q->size].id;
	*len = q->used->ring[q->last_used % q->size].len;
	q->last_used++;
	if (*head >= q->size)
		fail("queue %u: the device returned descriptor %u of %u", q->index, *head, q->size);
	if (!(q->inflight >> *head & 1)) {
		q->strays++;
		return true;
	}
	q->inflight &= ~(1ull << *head);
	for (d = *head; ; d = q->desc[d].next) {
		q->n_free++;
		if ((q->desc[d].flags & (DESC_NEXT | DESC_INDIRECT)) != DESC_NEXT)
			break;
	}
	q->desc[d].next = q->free_head;
	q->free_head = *head;
	return true;
}

bool vq_wait(struct vq *q, u32 *head, u32 *len, u64 timeout_ns)
{
	for (u64 t = now_ns(); !vq_pop(q, head, len); relax())
		if (now_ns() - t > timeout_ns)
			return false;
	return true;
}
