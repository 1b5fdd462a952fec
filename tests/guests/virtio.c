/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* Modern virtio-pci and split queues, polled, for any device (virtio 1.2, chapters 2.7 and 4.1).  Knows no device type. */
#include "guest.h"

enum {				/* struct virtio_pci_common_cfg */
	C_DFSELECT = 0, C_DF = 4, C_GFSELECT = 8, C_GF = 12, C_MSIX = 16, C_NUMQ = 18, C_STATUS = 20, C_GEN = 21, C_QSEL = 22,
	C_QSIZE = 24, C_QMSIX = 26, C_QENABLE = 28, C_QNOTIFY = 30, C_QDESC = 32, C_QAVAIL = 40, C_QUSED = 48,
};

#define R8(v, o)	(*(volatile u8 *)((v)->common + (o)))
#define R16(v, o)	(*(volatile u16 *)((v)->common + (o)))
#define R32(v, o)	(*(volatile u32 *)((v)->common + (o)))

bool vdev_find(struct vdev *v, u16 virtio_id, u32 nth)
{
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
	R8(v, C_STATUS) = 0;
	for (u64 t = now_ns(); R8(v, C_STATUS); relax())
		if (now_ns() - t > 10000000000ull)
			fail("device does not finish its reset");
}

bool vdev_negotiate(struct vdev *v, u64 wanted)
{
	R8(v, C_STATUS) = 1;
	R8(v, C_STATUS) = 3;
	R32(v, C_DFSELECT) = 0;
	v->offered = R32(v, C_DF);
	R32(v, C_DFSELECT) = 1;
	v->offered |= (u64)R32(v, C_DF) << 32;
	v->features = v->offered & wanted;
	R32(v, C_GFSELECT) = 0;
	R32(v, C_GF) = v->features;
	R32(v, C_GFSELECT) = 1;
	R32(v, C_GF) = v->features >> 32;
	R8(v, C_STATUS) = 11;
	return R8(v, C_STATUS) & 8;
}

void vq_setup(struct vq *q, struct vdev *v, u16 index, void *used_page)
{
	u8 *page = alloc_page();

	*q = (struct vq) { .dev = v, .index = index };
	memset(page, 0, PAGE);
	R16(v, C_QSEL) = index;
	q->size = MIN(R16(v, C_QSIZE), QMAX);
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

	R16(v, C_QSEL) = q->index;
	R16(v, C_QSIZE) = q->size;
	R16(v, C_QMSIX) = 0xffff;
	R32(v, C_QDESC) = (u64)q->desc;
	R32(v, C_QDESC + 4) = 0;
	R32(v, C_QAVAIL) = (u64)q->avail;
	R32(v, C_QAVAIL + 4) = 0;
	R32(v, C_QUSED) = (u64)q->used;
	R32(v, C_QUSED + 4) = 0;
	q->notify = (volatile u16 *)(v->notify_base + R16(v, C_QNOTIFY) * v->notify_mult);
	R16(v, C_QENABLE) = 1;
}

void vdev_ok(struct vdev *v)
{
	R8(v, C_STATUS) = 15;
}

u8 vdev_status(struct vdev *v)
{
	return R8(v, C_STATUS);
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
	*q->notify = q->index;
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
